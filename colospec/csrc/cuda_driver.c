/* Loads libcuda.so.1; cuda_driver.h lists what is taken from it. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static struct cuda_driver driver;
static bool is_loaded;
static char failure[512];

static int load_symbol(void *library, const char *symbol, void *target) {
    void *address = dlsym(library, symbol);
    if (address == NULL) {
        snprintf(failure, sizeof failure,
                 "libcuda.so.1 has no %s: the NVIDIA driver is too old; update it to 525 or newer",
                 symbol);
        return -1;
    }
    memcpy(target, &address, sizeof address); /* ISO C has no cast from object to function */
    return 0;
}

static int load_all(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(failure, sizeof failure,
                 "the CUDA driver cannot be loaded (%s); is this a GPU machine? "
                 "run python -m colospec.doctor",
                 dlerror());
        return -1;
    }
#define LOAD(name, symbol, parameters)                                                             \
    if (load_symbol(library, #symbol, &driver.name) < 0)                                           \
        goto fail;
    CUDA_DRIVER_FUNCTIONS(LOAD)
#undef LOAD
    is_loaded = true;
    return 0;
fail:
    dlclose(library);
    return -1;
}

const struct cuda_driver *load_cuda_driver(const char **error) {
    if (is_loaded || load_all() == 0)
        return &driver;
    *error = failure;
    return NULL;
}
