/* The ring: one writer (an engine) hands slots of features to one reader (its trainer).
 *
 * This file and ring.c are the whole protocol over raw shared memory, without Python or CUDA, so
 * that sanitizers can run it with two threads as peers. Rules that everything here keeps:
 *
 * - Slot i holds sequence number seq when (seq - start_seq) % num_slots == i. Counters are u64,
 * only grow and may wrap; differences are taken in unsigned arithmetic.
 * - `published` and `released` are plain 64-bit words on lines of their own, so that a GPU stream
 *   can write them. A slot's header is written by the host before its publication and never again
 *   until its release.
 * - A record (END, ERROR, CLOSE) names the count that it follows and has no effect before it: a
 *   record from the host overtakes counters that a stream writes.
 * - What the peer can write is copied first, then checked, and only the copy is used.
 */
#ifndef COLOSPEC_RING_H
#define COLOSPEC_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    RING_ABI = 1,
    RING_MAX_TENSORS = 8,
    RING_MAX_SLOTS = 1024,
    RING_NAME_BYTES = 32,
    RING_TEXT_BYTES = 4064,
    RING_ALIGNMENT = 256, /* of a tensor in its slot, in bytes */
};

enum ring_status {
    RING_READY,
    RING_AGAIN,  /* nothing yet; the caller looks at its deadline and at signals, then comes back */
    RING_END,    /* the writer's clean end; all slots are delivered */
    RING_ERROR,  /* the writer failed; all slots are delivered */
    RING_CLOSED, /* the reader wants no more */
    RING_DEAD,   /* the peer's process is gone; what it published is delivered */
    RING_CORRUPT, /* ring_end.fault names the field */
};

enum ring_record_kind { RING_NONE, RING_RECORD_END, RING_RECORD_ERROR, RING_RECORD_CLOSE };

enum ring_phase {
    RING_ABSENT,
    RING_ATTACHED,
    RING_WAITING, /* for a slot to fill, or for a full one */
    RING_HOLDING, /* the writer fills a slot; the reader has a lease */
    RING_ENDED,
    RING_FAILED,
    RING_LEFT,
};

struct ring_tensor {
    char name[RING_NAME_BYTES]; /* UTF-8, padded with zeros */
    uint32_t dtype;             /* a code that both sides agree on */
    uint32_t itemsize;
    uint64_t width;  /* elements per token */
    uint64_t offset; /* in the slot, bytes */
    uint64_t nbytes; /* in the geometry: of max_tokens; in a slot header: of num_tokens */
};

struct ring_geometry { /* immutable once formatted */
    uint64_t magic;
    uint32_t abi;
    uint32_t num_slots;
    uint64_t slot_bytes;
    uint64_t max_tokens;
    uint64_t max_sequences;
    uint64_t start_seq;
    uint32_t num_tensors;
    uint32_t reserved;
    struct ring_tensor tensors[RING_MAX_TENSORS];
    uint64_t checksum;
};

struct ring_micro_batch { /* what the writer says of a slot */
    uint64_t epoch;
    uint64_t micro_batch;
    uint64_t step;
    uint64_t digest;
    uint64_t num_tokens;
    uint64_t num_sequences;
};

struct ring_slot_header {
    _Alignas(128) uint64_t seq;
    struct ring_micro_batch what;
    uint32_t kind; /* RING_SLOT_DATA */
    uint32_t num_tensors;
    struct ring_tensor tensors[RING_MAX_TENSORS];
    uint64_t checksum;
};

struct ring_record {
    _Alignas(128) _Atomic uint64_t kind; /* enum ring_record_kind; stored last */
    uint64_t seq;                        /* counts once the counter has this value */
    uint64_t length;
    uint64_t checksum;
    char text[RING_TEXT_BYTES]; /* UTF-8, no terminator */
};

struct ring_side { /* for the other side's messages only; nothing depends on it */
    _Alignas(128) _Atomic uint64_t phase;
    _Atomic uint64_t since_ns; /* CLOCK_MONOTONIC */
    _Atomic uint64_t wait_ns;  /* spent waiting in acquire so far */
};

struct ring_control { /* one writer per 128-byte line */
    _Alignas(128) struct ring_geometry geometry;
    _Alignas(128) _Atomic uint64_t published; /* the writer's: slots published since seq 0 */
    _Alignas(128) _Atomic uint64_t released;  /* the reader's: slots released since seq 0 */
    struct ring_side writer;
    struct ring_side reader;
    struct ring_record writer_record; /* END or ERROR */
    struct ring_record reader_record; /* CLOSE */
    struct ring_slot_header slots[];
};

_Static_assert(offsetof(struct ring_control, published) == 640, "ABI 1: a stream writes here");
_Static_assert(offsetof(struct ring_control, released) == 768, "ABI 1: a stream writes here");
_Static_assert(offsetof(struct ring_control, writer_record) == 1152, "ABI 1");
_Static_assert(offsetof(struct ring_control, slots) == 9344, "ABI 1");
_Static_assert(sizeof(struct ring_slot_header) == 640, "ABI 1");
_Static_assert(sizeof(_Atomic uint64_t) == 8 && ATOMIC_LLONG_LOCK_FREE == 2, "a plain u64 word");

/* One side's private view of a ring; never in shared memory. */
struct ring_end {
    struct ring_control *control;
    struct ring_geometry geometry; /* the checked copy */
    bool is_writer;
    int peer_fd;        /* pidfd of the peer, borrowed; -1: do not watch it */
    uint64_t published; /* as last seen, or as written by us */
    uint64_t released;
    uint64_t taken; /* reader: the next sequence number to hand out */
    const char *fault;
    struct ring_slot_header header; /* reader: of the slot handed out last */
    struct ring_record record;      /* the peer's, once it counts */
};

/* A thing to wait for; returns RING_AGAIN while there is nothing to report. */
typedef enum ring_status ring_check(struct ring_end *end);
ring_check ring_check_free;   /* writer: READY for a free slot, or CLOSED */
ring_check ring_check_full;   /* reader: READY for a full slot (`header`), or END or ERROR */
ring_check ring_check_closed; /* writer: CLOSED */

/* Repeat `check` until it reports something, the peer dies, or until_ns (then RING_AGAIN). */
enum ring_status ring_wait(struct ring_end *end, ring_check *check, uint64_t until_ns);

size_t ring_control_bytes(uint32_t num_slots);
uint32_t ring_slot_of(const struct ring_end *end, uint64_t seq);
uint64_t ring_now_ns(void);

/* Writer: put the geometry into zeroed memory; fills in magic, abi and checksum. */
void ring_format(struct ring_control *control, struct ring_geometry *geometry);

/* Copy and check the geometry. Returns NULL, or the name of what is wrong. */
const char *ring_open(struct ring_end *end, void *control, size_t nbytes, bool is_writer);

/* Writer: describe the slot of the next sequence number, then publish it. */
void ring_stage(struct ring_end *end, const struct ring_micro_batch *what);
enum ring_status ring_publish(struct ring_end *end);

/* Reader: give back the `count` oldest slots taken. */
enum ring_status ring_release(struct ring_end *end, uint64_t count);

/* Leave this side's record, at most RING_TEXT_BYTES long; the first one stays. */
void ring_leave_record(struct ring_end *end, enum ring_record_kind kind, const char *text,
                       size_t length);
void ring_set_phase(struct ring_end *end, enum ring_phase phase);

#endif
