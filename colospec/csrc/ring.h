/* The ring: one writer (an engine) hands slots of features to one reader (its trainer).
 *
 * The whole protocol over raw memory, without Python or CUDA. Rules that everything here keeps:
 *
 * - Slot i holds sequence number seq when (seq - start_seq) % num_slots == i. Counters are u64,
 *   only grow and may wrap; differences are taken in unsigned arithmetic.
 * - The counters `published` and `released` are plain 64-bit words on lines of their own, so that a
 *   GPU stream can write them. A slot's header is written by the host before its publication and
 * never again until its release.
 * - A record (END, ERROR, CLOSED) names the count that it follows and has no effect before it: a
 *   record from the host overtakes counters that a stream writes.
 * - What the peer can write is copied first, then checked, and only the copy is used.
 */
#ifndef COLOSPEC_RING_H
#define COLOSPEC_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RING_NOTE_BYTES = 48, RING_LABEL_BYTES = 488, RING_TEXT_BYTES = 4064 };

enum ring_status {
    RING_READY,
    RING_AGAIN,   /* nothing before the deadline */
    RING_DEAD,    /* the peer's process is gone; what it published is delivered */
    RING_CORRUPT, /* shared memory that the protocol cannot have written */
    /* The kinds of records: what the other side's wait reports once it has reached one. */
    RING_END,    /* the writer's clean end; all slots are delivered */
    RING_ERROR,  /* the writer failed; all slots are delivered */
    RING_CLOSED, /* the reader wants no more */
};

/* What a side is at; after its record, the kind of that. */
enum ring_phase { RING_ABSENT, RING_WORKING, RING_WAITING, RING_HOLDING };

struct ring_geometry { /* immutable; both sides must expect the same */
    uint64_t magic;    /* filled in by ring_open */
    uint64_t num_slots;
    uint64_t start_seq;
    char label[RING_LABEL_BYTES]; /* text that both sides agree on, padded with zeros */
};

struct ring_slot_header {
    _Alignas(128) uint64_t seq;
    char note[RING_NOTE_BYTES]; /* what the writer says of the slot */
    uint64_t checksum;          /* of the geometry and of the fields above */
};

struct ring_record {
    _Alignas(128) _Atomic uint64_t kind; /* END, ERROR or CLOSED; stored last */
    uint64_t seq;                        /* counts once the counter has this value */
    uint64_t length;
    uint64_t checksum;
    char text[RING_TEXT_BYTES]; /* UTF-8, no terminator */
};

struct ring_side {                          /* the lines that one side alone writes */
    _Alignas(128) _Atomic uint64_t counter; /* the writer's: published; the reader's: released */
    _Alignas(128) _Atomic uint64_t phase;   /* from here for messages only */
    _Atomic uint64_t since_ns;              /* CLOCK_MONOTONIC */
    _Atomic uint64_t wait_ns;               /* spent in ring_wait so far */
    struct ring_record record;
};

struct ring_control {
    _Alignas(128) struct ring_geometry geometry;
    struct ring_side writer;
    struct ring_side reader;
    struct ring_slot_header slots[];
};

_Static_assert(offsetof(struct ring_control, writer.counter) == 512, "a stream writes here");
_Static_assert(offsetof(struct ring_control, reader.counter) == 4864, "a stream writes here");
_Static_assert(sizeof(_Atomic uint64_t) == 8 && ATOMIC_LLONG_LOCK_FREE == 2, "a plain u64 word");

enum { RING_CONTROL_BYTES = sizeof(struct ring_control) }; /* the headers come after it */
enum { RING_HEADER_BYTES = sizeof(struct ring_slot_header) };
_Static_assert(RING_CONTROL_BYTES == 9216 && RING_HEADER_BYTES == 128, "ABI 1");

/* One side's private view of a ring; never in shared memory. */
struct ring_end {
    struct ring_control *control;
    struct ring_side *own, *peer;
    struct ring_geometry geometry;
    bool is_writer;
    bool has_left;      /* has left its record */
    int peer_fd;        /* pidfd of the peer, borrowed; -1: do not watch it */
    uint64_t published; /* as last seen, or as written by us */
    uint64_t released;
    uint64_t taken;                 /* reader: the next sequence number to hand out */
    struct ring_slot_header header; /* reader: of the slot handed out last */
    struct ring_record record;      /* the peer's, once it counts; CORRUPT: its text names what */
};

uint64_t ring_now_ns(void);
uint32_t ring_slot_of(const struct ring_end *end, uint64_t seq);

/* Attach one side: the writer, first, to zeroed memory. Returns NULL, or what is wrong. */
const char *ring_open(struct ring_end *end, void *memory, size_t nbytes, bool is_writer,
                      const struct ring_geometry *geometry);

/* Wait until until_ns (then RING_AGAIN). READY: for the writer a slot is free, for the reader slot
 * `taken` is full, its header is copied and `taken` moves on. A writer that has left its record
 * waits for CLOSED alone. */
enum ring_status ring_wait(struct ring_end *end, uint64_t until_ns);

/* Writes a counter later, in the order of other work (a GPU stream's), and fences that work; false:
 * it could not be asked for. */
typedef bool (*ring_store)(void *context, _Atomic uint64_t *counter, uint64_t value);

/* Writer: describe the slot of the next sequence number and publish it; see ring_advance. */
enum ring_status ring_publish(struct ring_end *end, const char note[RING_NOTE_BYTES],
                              ring_store store, void *context);

/* Move this side's counter on, by `store` or, where that is NULL, at once: the reader gives back
 * its `count` oldest slots. AGAIN: `store` failed, and nothing has changed. */
enum ring_status ring_advance(struct ring_end *end, uint64_t count, ring_store store,
                              void *context);

/* Leave this side's record, at most RING_TEXT_BYTES long; the first one stays. */
void ring_leave(struct ring_end *end, enum ring_status kind, const char *text, size_t length);

/* Show what this side is at (enum ring_phase) until it leaves. */
void ring_set_phase(struct ring_end *end, uint64_t phase);

#endif
