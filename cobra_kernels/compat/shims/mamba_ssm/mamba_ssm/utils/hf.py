"""Reading the files of a Hugging Face repository: a folder, or a name that is in the local cache or can be fetched."""

from cobra_kernels.compat.lm import load_config_hf, load_state_dict_hf

__all__ = ["load_config_hf", "load_state_dict_hf"]
