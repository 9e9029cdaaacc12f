"""recipe.yaml → every fine-tuning, compression and score it asks for, each kept as a record → the papers' tables."""

from hf_lowrank.experiment.plan import plan_of
from hf_lowrank.experiment.recipe import Experiment, Recipe, load_recipe
from hf_lowrank.experiment.run import run_recipe
from hf_lowrank.experiment.tables import tables_of

__all__ = ["Experiment", "Recipe", "load_recipe", "plan_of", "run_recipe", "tables_of"]
