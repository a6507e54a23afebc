/* Stands in for libcuda.so.1 under the fake MPS daemon: cuInit becomes a client of the daemon in
 * CUDA_MPS_PIPE_DIRECTORY and, like the real one, says nothing if there is none. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int cuInit(unsigned flags) {
    const char *pipe = getenv("CUDA_MPS_PIPE_DIRECTORY");
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    char text[64];
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    (void)flags;
    if (getenv("FAKE_CUDA_ERROR"))
        return atoi(getenv("FAKE_CUDA_ERROR"));
    snprintf(to.sun_path, sizeof to.sun_path, "%s/control", pipe ? pipe : "");
    if (connect(fd, (struct sockaddr *)&to, sizeof to))
        return 0;
    snprintf(text, sizeof text, "register %d\n", (int)getpid());
    if (write(fd, text, strlen(text)) < 0 || read(fd, text, sizeof text) < 0)
        return 999;
    return 0; /* fd stays open: the daemon sees the end of this process */
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = NULL;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == 805 ? "MPS client failed to connect" : "unknown";
    return 0;
}
