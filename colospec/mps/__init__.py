"""CUDA MPS of one node: trainer and engine share a GPU through a daemon that lives as the job does.

`client` is what a rank uses; `keeper` is the process that owns the daemon; `products` proves that
matrix products are right. The keeper lives as long as a job, so nothing here imports torch before
a rank asks for it.
"""
