"""A task of one's own: topics of news, with the columns, labels and splits that its data set has."""

from hf_lowrank.tasks import TASKS, Task
from hf_lowrank.tasks.metrics import accuracy

TASKS["ag_news"] = Task(
    name="ag_news",
    kind="classification",
    text=("text",),
    label="label",
    hub=("fancyzhx/ag_news", None),
    score="accuracy",
    metrics=accuracy,
    label_names=("World", "Sports", "Business", "Sci/Tech"),
    validation=("test",),
)
