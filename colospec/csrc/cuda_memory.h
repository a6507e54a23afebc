/* The Python face of cuda_driver.h: memory that two processes share on one GPU. */
#ifndef COLOSPEC_CUDA_MEMORY_H
#define COLOSPEC_CUDA_MEMORY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cuda_driver.h"

enum { CUDA_OUT_OF_MEMORY = 2 };

/* Functions of the module colospec._ring; all but the first need a current CUDA context. */
extern PyMethodDef cuda_memory_methods[];

/* Raise MemoryError or RuntimeError for a CUresult; returns NULL. */
PyObject *raise_cuda_error(const char *what, int result);

#endif
