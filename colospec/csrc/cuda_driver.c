/* Loads libcuda.so.1; cuda_driver.h lists what is taken from it. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdio.h>

struct cuda_driver cuda_driver;

const char *load_cuda_driver(void) {
    static char failure[512];
    static void *library; /* never unloaded */
    if (library == NULL && (library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) == NULL) {
        snprintf(
            failure, sizeof failure,
            "the CUDA driver cannot be loaded (%s); run where an NVIDIA GPU is, in a container "
            "with its driver (docker run --gpus all)",
            dlerror());
        return failure;
    }
/* POSIX lets an object pointer hold the address of a function, where ISO C has no cast. */
#define LOAD(name, symbol, parameters)                                                             \
    if ((*(void **)&cuda_driver.name = dlsym(library, #symbol)) == NULL)                           \
        return "libcuda.so.1 has no " #symbol                                                      \
               ": the NVIDIA driver is too old; update it to 525 or newer";
    CUDA_DRIVER_FUNCTIONS(LOAD)
#undef LOAD
    return NULL;
}
