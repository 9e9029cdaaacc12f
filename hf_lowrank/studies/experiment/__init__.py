"""recipe.yaml → every fine-tuning, compression and score it asks for, each kept as a record → the papers' tables."""

from hf_lowrank.studies.experiment.plan import plan_of
from hf_lowrank.studies.experiment.recipe import Experiment, Recipe, load_recipe
from hf_lowrank.studies.experiment.run import run_recipe
from hf_lowrank.studies.experiment.tables import tables_of

__all__ = ["Experiment", "Recipe", "load_recipe", "plan_of", "run_recipe", "tables_of"]
