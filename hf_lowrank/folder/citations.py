"""A method's name → the papers to cite for it, as BibTeX."""

FWSVD = """@inproceedings{hsu2022fwsvd,
  title = {Language model compression with weighted low-rank factorization},
  author = {Hsu, Yen-Chang and Hua, Ting and Chang, Sungen and Lou, Qian and Shen, Yilin and Jin, Hongxia},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}"""
TFWSVD = """@inproceedings{hua2022tfwsvd,
  title = {Numerical Optimizations for Weighted Low-rank Estimation on Language Models},
  author = {Hua, Ting and Hsu, Yen-Chang and Wang, Felicity and Lou, Qian and Shen, Yilin and Jin, Hongxia},
  booktitle = {Proceedings of the 2022 Conference on Empirical Methods in Natural Language Processing},
  year = {2022}
}"""
ASVD = """@article{yuan2023asvd,
  title = {ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models},
  author = {Yuan, Zhihang and Shang, Yuzhang and Song, Yue and Wu, Qiang and Yan, Yan and Sun, Guangyu},
  journal = {arXiv:2312.05821},
  year = {2023}
}"""
DRONE = """@inproceedings{chen2021drone,
  title = {DRONE: Data-aware Low-rank Compression for Large NLP Models},
  author = {Chen, Patrick and Yu, Hsiang-Fu and Dhillon, Inderjit and Hsieh, Cho-Jui},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}"""
SVD_LLM = """@article{wang2024svdllm,
  title = {SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression},
  author = {Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi},
  journal = {arXiv:2403.07378},
  year = {2024}
}"""
KFAC = """@inproceedings{martens2015kfac,
  title = {Optimizing Neural Networks with Kronecker-factored Approximate Curvature},
  author = {Martens, James and Grosse, Roger},
  booktitle = {International Conference on Machine Learning},
  year = {2015}
}"""
EKFAC = """@inproceedings{george2018ekfac,
  title = {Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis},
  author = {George, Thomas and Laurent, C{\\'e}sar and Bouthillier, Xavier and Ballas, Nicolas and Vincent, Pascal},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}"""
GFWSVD = """@article{chekalina2025gfwsvd,
  title = {Generalized Fisher-Weighted SVD: Scalable Kronecker-Factored Fisher Approximation for Compressing Large Language Models},
  author = {Chekalina, Viktoriia and Moskovskiy, Daniil and Cherniuk, Daria and Kurkin, Maxim and Kuznetsov, Andrey and Frolov, Evgeny},
  journal = {arXiv:2505.17974},
  year = {2025}
}"""  # noqa: E501

OF_METHOD = {
    "asvd": (ASVD,),
    "whiten": (DRONE, SVD_LLM),
    "whiten-diag": (DRONE, SVD_LLM),
    "kfac": (KFAC,),
    "ekfac": (EKFAC,),
    "gfwsvd": (GFWSVD,),
}


def citations(method: str) -> list[str]:
    """The entries for FWSVD and TFWSVD, which began this family, and for `method` where it has others."""
    return [FWSVD, TFWSVD, *OF_METHOD.get(method, ())]
