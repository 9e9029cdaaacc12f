"""`python -m hf_lowrank …` and `accelerate launch -m hf_lowrank …`."""

from hf_lowrank.cli import main

if __name__ == "__main__":
    main()
