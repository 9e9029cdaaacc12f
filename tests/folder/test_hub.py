"""Pushing and pulling over a real socket: the real client, a Hub on loopback, processes of their own."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from huggingface_hub import ModelCard

import hf_lowrank
from hf_lowrank import CompressionConfig, compress
from hf_lowrank.folder.saving import save_compressed
from tests.helpers import outputs, tiny_bert, token_ids, word_tokenizer
from tests.hub_client import Client, Reply, environment, run_script
from tests.loopback_hub import LoopbackHub
from tests.tiny_task import write_encoder

ALICE, READER, BOB = "hf_aliceSecret", "hf_readerSecret", "hf_bobSecret"
TOKENS = {ALICE: ("alice", "write"), READER: ("alice", "read"), BOB: ("bob", "write")}
PUBLISHED = {
    "README.md",
    "compression.json",
    "config.json",
    "auto_lowrank.py",
    "editing_lowrank.py",
    "engines_lowrank.py",
    "matching_lowrank.py",
    "parents_lowrank.py",
    "publishing_lowrank.py",
    "configuration_lowrank.py",
    "experts_lowrank.py",
    "layers_lowrank.py",
    "model.safetensors",
    "modeling_lowrank.py",
    "ranks.png",
    "tokenizer.json",
    "tokenizer_config.json",
}
PUSHED_FOLDER = PUBLISHED | {"directions.safetensors"}  # which a model pushed from memory has not
SHARDS = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} | {"model.safetensors.index.json"}
LOAD = "model = AutoModelForSequenceClassification.from_pretrained({name!r}{flag}); "
CHECK = "expected = torch.load('expected.pt'); assert torch.equal(model(expected['ids']).logits, expected['logits'])\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model `base`, a compressed one `small`, the same in two shards, and its outputs."""
    place = tmp_path_factory.mktemp("place")
    model, tokenizer = tiny_bert(), word_tokenizer()
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    small, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    facts = {"base_model": "me/base", "task": "cola", "data": "nyu-mll/glue", "score_dense": 51.5}
    save_compressed(small, tokenizer, report, place / "small", **facts, score_compressed=48.25)
    shutil.copytree(place / "small", place / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    small.save_pretrained(place / "sharded", max_shard_size="35KB")
    torch.save({"ids": token_ids(), "logits": outputs(small)}, place / "expected.pt")
    for stray in ("optimizer.pt", "checkpoint-3/model.safetensors", ".cache/x.json", "trainer_state.json"):
        (place / "small" / stray).parent.mkdir(exist_ok=True)
        (place / "small" / stray).write_text("{}")
    return place


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), TOKENS) as hub:
        yield hub


@pytest.fixture(scope="module")
def clients(hub: LoopbackHub, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    """A process with the library and one without it, each with a cache of its own; both start at once."""
    homes = [tmp_path_factory.mktemp("home") for _ in range(2)]
    settings = [environment(hub.url, home, ALICE) for home in homes]
    with Client(settings[0], place, library=True) as with_it, Client(settings[1], place, library=False) as without_it:
        yield with_it, without_it


@pytest.fixture
def client(clients: tuple[Client, Client]) -> Client:
    return clients[0]


@pytest.fixture
def bare(clients: tuple[Client, Client]) -> Client:
    return clients[1]


def pushed(reply: Reply) -> dict[str, str]:
    assert (reply.code, reply.error) == (0, ""), reply.err[-4000:]
    found: dict[str, str] = json.loads(reply.out)
    return found


# --- pushing a folder ---


@pytest.mark.slow
def test_push_publishes_a_folder_in_one_commit(client: Client, hub: LoopbackHub, place: Path) -> None:
    reply = client.command("push", "small", "alice/small", "--message", "First version", "--json")
    assert pushed(reply)["address"].startswith(f"{hub.url}/alice/small/commit/")
    assert hub.store.log("alice/small") == ["First version", "initial commit"]
    files = hub.files("alice/small")
    assert set(files) == PUSHED_FOLDER  # and nothing of what training left there
    for name in PUSHED_FOLDER - {"README.md"}:
        assert files[name] == (place / "small" / name).read_bytes(), name
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("alice/small", trust_remote_code=True)' in card.text
    assert '"small"' not in card.text
    assert not hub.store.private("alice/small")
    assert "Secret" not in reply.out + reply.err + json.dumps(list(map(bytes.hex, files.values())))


@pytest.mark.slow
def test_private_repositories_branches_and_pull_requests(client: Client, hub: LoopbackHub) -> None:
    pushed(client.command("push", "small", "alice/hidden", "--private", "--json"))
    assert hub.store.private("alice/hidden")
    pushed(client.command("push", "small", "alice/branched", "--revision", "v2", "--json"))
    assert "model.safetensors" in hub.files("alice/branched", "v2")
    assert hub.files("alice/branched") == {}
    request = pushed(client.command("push", "small", "alice/branched", "--create-pr", "--json", HF_TOKEN=BOB))
    assert request["address"] == f"{hub.url}/alice/branched/discussions/1"
    assert set(hub.files("alice/branched", "refs/pr/1")) == PUSHED_FOLDER
    assert hub.files("alice/branched") == {}

    load = LOAD.format(name="alice/branched", flag=", revision='v2'")
    client.done(load + CHECK)
    assert "OSError" in client.run(LOAD.format(name="alice/branched", flag=", revision='v3'")).error
    assert "OSError" in client.run(LOAD.format(name="alice/hidden", flag=""), HF_TOKEN=BOB).error
    client.done(LOAD.format(name="alice/hidden", flag="") + CHECK)


def test_weights_that_are_replaced_are_removed_in_the_same_commit(client: Client, hub: LoopbackHub) -> None:
    """Or from_pretrained would find the old model.safetensors before the new shards."""
    pushed(client.command("push", "small", "alice/shards", "--json"))
    pushed(client.command("push", "sharded", "alice/shards", "--json"))
    assert set(hub.files("alice/shards")) == PUSHED_FOLDER - {"model.safetensors"} | SHARDS
    client.done(LOAD.format(name="alice/shards", flag="") + CHECK)
    pushed(client.command("push", "small", "alice/shards", "--json"))
    assert set(hub.files("alice/shards")) == PUSHED_FOLDER
    assert len(hub.store.log("alice/shards")) == 4


def test_an_edited_card_is_published_as_it_was_edited(client: Client, hub: LoopbackHub, place: Path) -> None:
    shutil.copytree(place / "small", place / "edited")
    path = place / "edited" / "README.md"
    path.write_text(path.read_text().replace("## Limits\n", "## Limits\n\n- It has opinions.\n"))
    pushed(client.command("push", "edited", "alice/edited", "--json"))
    card = hub.files("alice/edited")["README.md"].decode()
    assert "- It has opinions." in card
    assert 'from_pretrained("alice/edited")' in card
    assert "\n# alice/edited\n" in card
    (place / "edited" / "README.md").unlink()
    pushed(client.command("push", "edited", "alice/edited", "--json"))
    assert "opinions" not in hub.files("alice/edited")["README.md"].decode()


@pytest.mark.slow
def test_compress_publishes_what_it_made(client: Client, hub: LoopbackHub, place: Path) -> None:
    rows = "[{'sentence': f'w{n} w5', 'label': n % 2} for n in range(8)]"
    client.done(
        "from pathlib import Path; from datasets import Dataset; Path('data').mkdir()\n"
        f"for split in ('train', 'validation'): Dataset.from_list({rows}).to_parquet(f'data/{{split}}.parquet')"
    )
    words = ["compress", "base", "--task", "cola", "--data-dir", "data", "--method", "svd", "--output", "made"]
    reply = client.command(*words, "--evaluate", "--push-to-hub", "alice/made", "--json")
    assert pushed(reply)["address"].startswith(f"{hub.url}/alice/made/commit/")
    assert set(hub.files("alice/made")) == PUSHED_FOLDER
    record = json.loads(hub.files("alice/made")["compression.json"])
    scores = ModelCard(hub.files("alice/made")["README.md"].decode()).data.eval_results
    assert [result.metric_value for result in scores or []] == [round(record["score_compressed"], 4)]
    refused = client.command(*words, "--overwrite", "--push-to-hub", "alice/made", HF_TOKEN=None)
    assert refused.code == 2
    assert "hf auth login" in refused.err


# --- what goes wrong ---


def test_the_loopback_hub_checks_what_it_stores(hub: LoopbackHub) -> None:
    """So that the tests here can fail: other bytes than announced, and paths out of the repository, are refused."""
    hub.store.create("alice/checked", private=False)
    header, token = {"key": "header", "value": {"summary": "Bad"}}, {"Authorization": f"Bearer {ALICE}"}
    outside = {"key": "file", "value": {"path": "../outside", "content": "", "encoding": "base64"}}
    absent = {"key": "lfsFile", "value": {"path": "x.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    commit = f"{hub.url}/api/models/alice/checked/commit/main"
    requests = [
        Request(f"{hub.storage_url}/lfs/{'0' * 64}", b"other bytes", token, method="PUT"),
        *(Request(commit, f"{json.dumps(header)}\n{json.dumps(line)}".encode(), token) for line in (outside, absent)),
    ]
    for request in requests:
        with pytest.raises(HTTPError, match="400"):
            urlopen(request)
    assert hub.store.log("alice/checked") == ["initial commit"]


@pytest.mark.parametrize(
    ("words", "token", "fault", "message"),
    [
        (["small", "alice/small"], None, None, "there is no Hub token: log in with 'hf auth login', or set HF_TOKEN"),
        (["small", "alice/small"], "hf_wrongSecret", None, "does not accept the token (401)"),
        (["small", "alice/small"], READER, None, "alice/small: the token lacks the rights for it (403: You don't have"),
        (["small", "bob/new"], ALICE, None, "bob/new: the token lacks the rights for it (403"),
        (
            ["small", "alice/small", "--revision", "refs/pr/77"],
            ALICE,
            None,
            "alice/small: the repository has no such revision; nothing was committed",
        ),
        (["small", "alice/a/b"], ALICE, None, "alice/a/b: repositories are called 'user/name'"),
        (["small", "alice/small"], ALICE, ("POST /api/repos/create", 501), "the Hub failed (501: This server is"),
        (["small", "alice/fresh"], ALICE, ("PUT /lfs/|/objects/batch", 501), "alice/fresh: the Hub failed (501"),
        (["small", "alice/fresh"], ALICE, ("POST .*/commit/", 501), "alice/fresh: the Hub failed (501"),
        (
            ["small", "alice/fresh"],
            ALICE,
            ("POST .*/preupload/", 0),
            "alice/fresh: the Hub cannot be reached, or the connection broke off",
        ),
        (["base", "alice/small"], ALICE, None, "base is an ordinary bert model: push it with transformers"),
        (["nowhere", "alice/small"], ALICE, None, "nowhere is not a model: there is no config.json in it"),
        (["codeless", "alice/small"], ALICE, None, "codeless lacks modeling_lowrank.py"),
        (["cardless", "alice/small"], ALICE, None, "cardless has neither a card (README.md) nor the record"),
        (["unnamed", "alice/small"], ALICE, None, "metadata"),
    ],
)
def test_failures_are_one_line_and_change_nothing(
    client: Client,
    hub: LoopbackHub,
    place: Path,
    words: list[str],
    token: str | None,
    fault: tuple[str, int] | None,
    message: str,
) -> None:
    spoilt = {"codeless": "modeling_lowrank.py", "cardless": "compression.json", "unnamed": "tokenizer.json"}
    for name, lacking in spoilt.items():
        shutil.copytree(place / "small", place / name, dirs_exist_ok=True)
        (place / name / lacking).unlink()
    (place / "cardless" / "README.md").unlink()
    (place / "unnamed" / "README.md").write_text("No metadata here.\n")
    repos = {repo: hub.store.log(repo) for repo in ("alice/small", "alice/fresh") if hub.store.exists(repo)}
    with hub.fault(*fault or ("nothing", 0)):
        reply = client.command("push", *words, HF_TOKEN=token)
    assert (reply.code, reply.out) == (2, ""), reply
    last = reply.err.strip().splitlines()[-1]
    assert last.startswith("hf-lowrank: ")
    assert message in last
    assert "Traceback" not in reply.err
    assert "Secret" not in reply.err
    assert all(hub.store.log(repo) == log for repo, log in repos.items())
    if hub.store.exists("alice/fresh"):
        assert hub.files("alice/fresh") == {}


def test_no_network_is_one_line(client: Client) -> None:
    unreachable = "import huggingface_hub.constants as c; before, c.ENDPOINT = c.ENDPOINT, 'http://127.0.0.1:9'\n"
    push = "sys.argv = ['hf-lowrank', 'push', 'small', 'alice/small']\n"
    reply = client.run(f"{unreachable}{push}try: hf_lowrank.cli.main()\nfinally: c.ENDPOINT = before")
    assert reply.code == 2
    assert re.fullmatch(
        r"hf-lowrank: alice/small: the Hub cannot be reached.* \(.+\); nothing was committed\n", reply.err
    )


# --- pushing a model ---


def test_a_model_in_memory_is_pushed_with_tokenizer_and_card_in_one_commit(client: Client, hub: LoopbackHub) -> None:
    client.done(
        "model = AutoModelForSequenceClassification.from_pretrained('base')\n"
        "config = hf_lowrank.CompressionConfig('svd', 0.25)\n"
        "model, _ = hf_lowrank.compress(model, config, progress=False)\n"
        "model.push_to_hub('alice/memory', commit_message='From memory', tags=['tiny'], private=True)\n"
    )
    assert hub.store.log("alice/memory") == ["From memory", "initial commit"]
    assert hub.store.private("alice/memory")
    assert set(hub.files("alice/memory")) == PUBLISHED
    card = ModelCard(hub.files("alice/memory")["README.md"].decode())
    record = json.loads(hub.files("alice/memory")["compression.json"])
    assert "tiny" in card.data.tags
    assert f"{record['parameters_after']:,}" in card.text
    assert card.data.eval_results is None  # nothing was scored
    client.done(LOAD.format(name="alice/memory", flag="") + CHECK)


def test_a_reloaded_model_is_pushed_with_its_card_until_its_weights_change(client: Client, hub: LoopbackHub) -> None:
    pushed(client.command("push", "small", "alice/small", "--json"))
    for origin in ("small", "alice/small"):
        client.done(LOAD.format(name=origin, flag="") + "model.push_to_hub('alice/again')")
        files, original = hub.files("alice/again"), hub.files("alice/small")
        assert set(files) == PUBLISHED
        assert files["README.md"].decode() == original["README.md"].decode().replace(
            "alice/small", "alice/again"
        ).replace("- name: small\n", "- name: again\n")
        assert files["compression.json"] == original["compression.json"]
    change = "model.classifier.weight.data.mul_(2); "
    client.done(LOAD.format(name="small", flag="") + change + "model.push_to_hub('alice/tuned')")
    files = hub.files("alice/tuned")
    assert set(files) == PUBLISHED - {"compression.json", "ranks.png"}
    assert "48.25" not in files["README.md"].decode()  # the score of other weights
    assert "without a record" in files["README.md"].decode()
    client.done(LOAD.format(name="small", flag="") + change + "model.push_to_hub('alice/again')")
    assert "without a record" not in hub.files("alice/again")["README.md"].decode()  # the better card stays


def test_a_tokenizer_is_never_made_up(client: Client, hub: LoopbackHub, place: Path) -> None:
    """Asked for one that is not there, transformers makes one that knows no words."""
    shutil.copytree(place / "small", place / "wordless", ignore=shutil.ignore_patterns("tokenizer*"))
    reply = client.run(LOAD.format(name="wordless", flag="") + "model.push_to_hub('alice/wordless')")
    assert not reply.error
    assert set(hub.files("alice/wordless")) == PUBLISHED - {"tokenizer.json", "tokenizer_config.json"}


def test_saving_and_pushing_at_once_keeps_the_folders_card(client: Client, hub: LoopbackHub, place: Path) -> None:
    shutil.copytree(place / "small", place / "saved")
    before = (place / "saved" / "README.md").read_bytes()
    push = "push_to_hub=True, repo_id='alice/saved', commit_message='Both'"
    client.done(LOAD.format(name="small", flag="") + f"model.save_pretrained('saved', {push})")
    assert (place / "saved" / "README.md").read_bytes() == before
    assert hub.store.log("alice/saved") == ["Both", "initial commit"]
    assert set(hub.files("alice/saved")) == PUBLISHED


def test_branches_and_pull_requests_of_a_model(client: Client, hub: LoopbackHub) -> None:
    load = LOAD.format(name="small", flag="")
    client.done(load + "model.push_to_hub('alice/parts', revision='v2', max_shard_size='35KB')")
    assert set(hub.files("alice/parts", "v2")) >= SHARDS
    assert hub.files("alice/parts") == {}
    client.done(LOAD.format(name="alice/parts", flag=", revision='v2'") + CHECK)
    client.done(load + "print(model.push_to_hub('alice/parts', create_pr=True).pr_url)", HF_TOKEN=BOB)
    assert set(hub.files("alice/parts", "refs/pr/1")) == PUBLISHED
    refused = client.run(load + "model.push_to_hub('alice/parts')", HF_TOKEN=BOB)
    assert "403" in refused.error
    assert "Secret" not in refused.error + refused.err
    client.done(load + f"model.push_to_hub('alice/parts', token={ALICE!r})", HF_TOKEN=None)
    assert set(hub.files("alice/parts")) == PUBLISHED


# --- without the library ---


def test_without_the_library_models_are_pulled_by_the_code_they_carry(bare: Client, client: Client) -> None:
    pushed(client.command("push", "small", "alice/pulled", "--json"))
    pushed(client.command("push", "sharded", "alice/pulled", "--revision", "sharded", "--json"))
    for flags in (", trust_remote_code=True", ", trust_remote_code=True, revision='sharded'"):
        bare.done(LOAD.format(name="alice/pulled", flag=flags) + CHECK + "assert not hasattr(sys, 'hf_lowrank')")
    refused = bare.run(LOAD.format(name="alice/pulled", flag=", trust_remote_code=False")).error
    assert "trust_remote_code=True" in refused
    bare.done(
        "classify = pipeline('text-classification', model='alice/pulled', trust_remote_code=True)\n"
        "assert type(classify.model).__name__ == 'LowRankBertForSequenceClassification'\n"
        "assert 0.5 <= classify('w2 w3')[0]['score'] <= 1"
    )
    client.done("assert 0.5 <= pipeline('text-classification', model='alice/pulled')('w2 w3')[0]['score'] <= 1")


def test_without_the_library_a_model_is_pushed_whole(bare: Client, client: Client, hub: LoopbackHub) -> None:
    pushed(client.command("push", "small", "alice/origin", "--json"))
    load = LOAD.format(name="alice/origin", flag=", trust_remote_code=True")
    bare.done(load + "model.push_to_hub('alice/copy')")
    assert set(hub.files("alice/copy")) == PUBLISHED
    assert len(hub.store.log("alice/copy")) == 2
    assert "48.25" in hub.files("alice/copy")["README.md"].decode()
    client.done(LOAD.format(name="alice/copy", flag="") + CHECK)
    bare.done(load + "model.classifier.weight.data.mul_(2); model.push_to_hub('alice/changed', tags=['twice'])")
    files = hub.files("alice/changed")
    assert set(files) == PUBLISHED - {"compression.json", "ranks.png"}
    card = ModelCard(files["README.md"].decode())
    assert 'AutoModelForSequenceClassification.from_pretrained("alice/changed", trust_remote_code=True)' in card.text
    assert set(card.data.tags) >= {"low-rank", "twice"}


def test_a_newer_format_is_refused_in_words(bare: Client, client: Client) -> None:
    client.done(
        "import json, pathlib, shutil; shutil.copytree('small', 'newer', ignore=shutil.ignore_patterns('*.pt'))\n"
        "path = pathlib.Path('newer/config.json')\n"
        "path.write_text(json.dumps(json.loads(path.read_text()) | {'lowrank_format_version': 2}))\n"
        "from huggingface_hub import HfApi\n"
        "HfApi().create_repo('alice/newer'); HfApi().upload_file(path_or_fileobj=path, path_in_repo='config.json', "
        "repo_id='alice/newer')\n"
        "from hf_lowrank.nn.configuration_lowrank import SOURCE_FILES\n"
        "for name in (*SOURCE_FILES, 'model.safetensors'):\n"
        "    HfApi().upload_file(path_or_fileobj=f'newer/{name}', path_in_repo=name, repo_id='alice/newer')"
    )
    for one, flag in ((client, ""), (bare, ", trust_remote_code=True")):
        error = one.run(LOAD.format(name="alice/newer", flag=flag)).error
        assert "This checkpoint has low-rank format 2, and this code reads up to 1: upgrade hf_lowrank" in error
    refused = client.command("push", "newer", "alice/small")
    assert refused.code == 2
    assert "low-rank format 2" in refused.err


def test_a_download_that_breaks_off_is_an_error_and_the_next_one_is_whole(client: Client, hub: LoopbackHub) -> None:
    pushed(client.command("push", "small", "alice/broken", "--json"))
    load = "model = AutoModelForSequenceClassification.from_pretrained('alice/broken', cache_dir='broken-cache'); "
    with hub.fault("GET /lfs/", 0):
        assert client.run(load).error
    assert not list((Path(hub.root).parents[0]).glob("**/broken-cache/**/*.safetensors"))
    client.done(load + CHECK)


@pytest.mark.parametrize(
    ("name", "token", "fault", "message"),
    [
        ("alice/none", ALICE, None, "there is no such repository, or it is private and the token"),
        ("alice/secret", BOB, None, "there is no such repository, or it is private and the token"),
        ("alice/secret", None, None, "there is no such repository, or it is private and the token"),
        ("alice/secret", "hf_wrongSecret", None, "the Hub does not accept the token (401)"),
        ("alice/secret", ALICE, ("GET /lfs/", 501), "the Hub failed (501"),
        ("alice/secret", ALICE, ("GET /lfs/", 0), "the Hub cannot be reached, or the connection broke off"),
    ],
)
def test_failures_of_pulling_are_one_line(
    client: Client, hub: LoopbackHub, name: str, token: str | None, fault: tuple[str, int] | None, message: str
) -> None:
    if not hub.store.exists("alice/secret"):
        pushed(client.command("push", "small", "alice/secret", "--private", "--json"))
    with hub.fault(*fault or ("nothing", 0)):
        reply = client.command("evaluate", name, "--task", "cola", HF_TOKEN=token)
    assert (reply.code, reply.out) == (2, "")
    assert re.fullmatch(rf"hf-lowrank: {name} cannot be loaded as a model for cola: .+\n", reply.err), reply.err
    assert message in reply.err
    assert "Secret" not in reply.err


def test_bytes_that_changed_on_the_way_are_found_by_verify(client: Client, hub: LoopbackHub) -> None:
    """The client compares sizes alone."""
    pushed(client.command("push", "small", "alice/flipped", "--json"))
    commit = hub.store.resolve("alice/flipped", "main")
    blob = hub.store.blob(hub.store.files("alice/flipped", commit)["model.safetensors"].sha256)
    whole = blob.read_bytes()
    try:
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        client.done(
            "from huggingface_hub import snapshot_download; snapshot_download('alice/flipped', local_dir='got')"
        )
    finally:
        blob.write_bytes(whole)
    reply = client.command("verify", "got")
    assert reply.code != 0
    assert "model.safetensors has changed" in reply.out + reply.err


@pytest.mark.slow
def test_a_model_of_sentence_transformers_is_compressed_as_one_from_the_hub(client: Client, place: Path) -> None:
    pytest.importorskip("sentence_transformers")
    made = """
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
body = Transformer("encoder")
parts = [body, Pooling(body.get_embedding_dimension()), Dense(body.get_embedding_dimension(), 24), Normalize()]
SentenceTransformer(modules=parts, device="cpu").save("sentences")
from huggingface_hub import HfApi
HfApi().create_repo("alice/sentences")
HfApi().upload_folder(folder_path="sentences", repo_id="alice/sentences")
"""
    write_encoder(place / "encoder")
    (place / "texts.txt").write_text("w1 w2 w3\nw4 w5\nw1 w7 w9 w11\nw5 w6\n")
    client.done(made)
    for name, output in (("alice/sentences", "pulled"), ("./sentences", "local")):
        reply = client.command("compress", name, "--texts", "texts.txt", "--rank-ratio", 0.4, "--output", output)
        assert (reply.code, reply.error) == (0, ""), reply.err[-4000:]
    for name in ("model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (place / "pulled" / name).read_bytes() == (place / "local" / name).read_bytes(), name
    record = json.loads((place / "pulled" / "compression.json").read_text())
    assert record["base_model"] == "alice/sentences"
    assert record["statistics"]["labels"] == "model, sentence_embedding"


SNIPPET = re.compile(r"```python\n(.+?)```", re.DOTALL)


@pytest.mark.slow
def test_the_snippets_of_a_card_run_with_a_fresh_cache_and_offline_with_a_warm_one(
    client: Client, hub: LoopbackHub, place: Path, tmp_path: Path
) -> None:
    pushed(client.command("push", "small", "alice/shown", "--json"))
    without_library, with_library = SNIPPET.findall(hub.files("alice/shown")["README.md"].decode())
    check = "\nimport torch\n" + CHECK + "assert tokenizer('w2 w3').input_ids == [2, 3]\nprint('done')"
    online = environment(hub.url, tmp_path / "home", None)
    assert run_script(without_library + check, online, place, library=False).endswith("done\n")
    offline = environment("http://127.0.0.1:9", tmp_path / "home", None, HF_HUB_OFFLINE="1")
    assert run_script(without_library + check, offline, place, library=False).endswith("done\n")
    # With the library no code of the repository is needed, nor fetched.
    seen = len(hub.requests)
    fresh = environment(hub.url, tmp_path / "other", None)
    assert run_script(with_library + check, fresh, place, library=True).endswith("done\n")
    assert not [request for request in hub.requests[seen:] if request.endswith(".py")]


def test_remote_code_is_never_switched_on() -> None:
    """What a user's base model may carry is not run: no call of the library sets the flag to anything but False."""
    package = Path(hf_lowrank.__file__).parent
    calls = [
        (path.name, keyword.value)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert calls
    assert all(isinstance(value, ast.Constant) and value.value is False for _, value in calls)


def test_a_repository_without_a_tokenizer_is_refused(place: Path, clients: tuple[Client, Client]) -> None:
    upload = "from huggingface_hub import HfApi; api = HfApi(); api.create_repo({0!r}, exist_ok=True); "
    upload += "api.upload_folder(repo_id={0!r}, folder_path='base', allow_patterns={1!r})"
    clients[0].done(upload.format("alice/wordless", ["config.json", "model.safetensors"]))
    clients[0].done(upload.format("alice/worded", ["config.json", "model.safetensors", "tokenizer*"]))
    read = "from hf_lowrank.folder.tokenizers import load_tokenizer; print(len(load_tokenizer({!r})))"
    assert int(clients[0].done(read.format("alice/worded"))) == 64
    refused = clients[0].run(read.format("alice/wordless")).error
    assert refused.startswith("LowRankError: alice/wordless has no tokenizer (tokenizer.json, vocab.txt are not there)")
