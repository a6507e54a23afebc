/* ring.c under the sanitizers: `race peers` runs writer and reader as two threads, `race flips`
 * damages every byte of a control block that ends where its allocation ends. Exits 0 if all is
 * well.
 */
#define _GNU_SOURCE
#include "ring.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_SLOTS = 3, MAX_TOKENS = 16, WIDTH = 24 };

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct job {
    struct ring_end writer;
    uint64_t start_seq;
    uint32_t (*payload)[MAX_TOKENS * WIDTH];
    uint64_t total;
    uint64_t close_after; /* the reader leaves after so many slots; 0: never */
    enum ring_status last;
};

enum { CONTROL_BYTES = RING_CONTROL_BYTES + NUM_SLOTS * RING_HEADER_BYTES };

struct note {
    uint64_t index, digest, num_tokens, rest[3];
};
_Static_assert(sizeof(struct note) == RING_NOTE_BYTES, "a note fills its field");

static const char *attach(struct ring_end *end, struct ring_control *control, bool is_writer,
                          uint64_t start_seq) {
    struct ring_geometry geometry = {
        .num_slots = NUM_SLOTS, .start_seq = start_seq, .label = "features:float32[24]"};
    return ring_open(end, control, CONTROL_BYTES, is_writer, &geometry);
}

/* The peers' threads may attach in any order, so the writer's end is made here. */
static struct ring_control *make_control(struct ring_end *writer, uint64_t start_seq) {
    struct ring_control *control = aligned_alloc(128, CONTROL_BYTES);
    CHECK(control != NULL);
    memset(control, 0, CONTROL_BYTES);
    CHECK(attach(writer, control, true, start_seq) == NULL);
    return control;
}

static struct note describe(uint64_t index) {
    return (struct note){index, index * 0x9e3779b97f4a7c15u, index % 17, {0}};
}

static enum ring_status wait_long(struct ring_end *end) {
    return ring_wait(end, ring_now_ns() + 60000000000u);
}

static void *write_all(void *argument) {
    struct job *job = argument;
    struct ring_end end = job->writer;
    for (uint64_t index = 0; index < job->total; index++) {
        enum ring_status status = wait_long(&end);
        if (status == RING_CLOSED && job->close_after)
            return NULL;
        CHECK(status == RING_READY);
        struct note note = describe(index);
        uint32_t *slot = job->payload[ring_slot_of(&end, end.published)];
        for (uint64_t i = 0; i < note.num_tokens * WIDTH; i++)
            slot[i] = (uint32_t)(index * 31 + i);
        CHECK(ring_publish(&end, (const char *)&note, NULL, NULL) == RING_READY);
    }
    ring_leave(&end, job->last, "boom", 4);
    CHECK(wait_long(&end) == RING_CLOSED);
    return NULL;
}

static void *read_all(void *argument) {
    struct job *job = argument;
    struct ring_end end;
    uint64_t index = 0;
    enum ring_status status;
    CHECK(attach(&end, job->writer.control, false, job->start_seq) == NULL);
    while ((status = wait_long(&end)) == RING_READY) {
        struct note expected = describe(index);
        uint32_t *slot = job->payload[ring_slot_of(&end, end.taken - 1)];
        CHECK(memcmp(end.header.note, &expected, sizeof expected) == 0);
        for (uint64_t i = 0; i < expected.num_tokens * WIDTH; i++)
            CHECK(slot[i] == (uint32_t)(index * 31 + i));
        memset(slot, 0xff, sizeof *job->payload);
        index++;
        CHECK(ring_advance(&end, 1, NULL, NULL) == RING_READY);
        if (index == job->close_after)
            break;
    }
    if (!job->close_after) {
        CHECK(index == job->total);
        CHECK(status == job->last);
        CHECK(end.record.length == 4 && memcmp(end.record.text, "boom", 4) == 0);
    }
    ring_leave(&end, RING_CLOSED, "", 0);
    return NULL;
}

static void run_peers(struct job job) {
    pthread_t writer, reader;
    struct ring_control *control = make_control(&job.writer, job.start_seq);
    job.payload = calloc(NUM_SLOTS, sizeof *job.payload);
    pthread_create(&writer, NULL, write_all, &job);
    pthread_create(&reader, NULL, read_all, &job);
    pthread_join(writer, NULL);
    pthread_join(reader, NULL);
    free(control);
    free(job.payload);
}

static void read_damaged(struct ring_control *control) {
    struct ring_end end;
    int num_taken = 0;
    if (attach(&end, control, false, 0) != NULL)
        return;
    while (ring_wait(&end, 0) == RING_READY) {
        CHECK(++num_taken <= NUM_SLOTS);
        CHECK(ring_slot_of(&end, end.taken - 1) < NUM_SLOTS);
        if (num_taken < NUM_SLOTS && ring_advance(&end, 1, NULL, NULL) != RING_READY)
            return;
    }
}

static void write_damaged(const struct ring_end *pristine) {
    struct note note = describe(5);
    struct ring_end end = *pristine;
    for (int i = 0; i <= NUM_SLOTS; i++) {
        if (ring_wait(&end, 0) != RING_READY)
            break;
        CHECK(i < NUM_SLOTS);
        if (ring_publish(&end, (const char *)&note, NULL, NULL) != RING_READY)
            break;
    }
    ring_leave(&end, RING_END, "", 0);
    ring_wait(&end, 0);
}

static void run_flips(void) {
    static const unsigned char patterns[] = {0x01, 0x80, 0x7f, 0xff};
    struct ring_end writer, reader;
    struct ring_control *control = make_control(&writer, 0);
    unsigned char *pristine = malloc(CONTROL_BYTES);
    for (uint64_t index = 0; index < 2; index++) {
        struct note note = describe(index + 3);
        CHECK(ring_publish(&writer, (const char *)&note, NULL, NULL) == RING_READY);
    }
    struct ring_end has_left = writer;
    ring_leave(&has_left, RING_ERROR, "boom", 4);
    CHECK(attach(&reader, control, false, 0) == NULL);
    ring_leave(&reader, RING_CLOSED, "", 0);
    memcpy(pristine, control, CONTROL_BYTES);
    for (int has_close = 0; has_close < 2; has_close++)
        for (size_t i = 0; i < CONTROL_BYTES; i++)
            for (size_t p = 0; p < sizeof patterns; p++) {
                for (int side = 0; side < 2; side++) {
                    memcpy(control, pristine, CONTROL_BYTES);
                    if (!has_close)
                        atomic_store(&control->reader.record.kind, RING_ABSENT);
                    ((unsigned char *)control)[i] ^= patterns[p];
                    if (side == 0)
                        read_damaged(control);
                    else
                        write_damaged(&writer);
                }
            }
    free(control);
    free(pristine);
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "flips") == 0) {
        run_flips();
        return 0;
    }
    static const uint64_t starts[] = {0, (1ull << 32) - 5, (1ull << 63) - 5, UINT64_MAX - 5};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        run_peers((struct job){.start_seq = starts[i], .total = 3000, .last = RING_END});
        run_peers((struct job){.start_seq = starts[i], .total = 100, .last = RING_ERROR});
        run_peers((struct job){
            .start_seq = starts[i], .total = 100, .last = RING_END, .close_after = 50});
    }
    return 0;
}
