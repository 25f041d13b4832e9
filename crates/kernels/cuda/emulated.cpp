// The kernels as functions of the host, by name, for `src/cuda/emulated.rs`.
#include "kernels.cu"

namespace {
struct Entry {
    const char* name;
    void (*run)(const void*);
};
#define ENTRY(name, Parameters) \
    { #name, [](const void* p) { name(*static_cast<const Parameters*>(p)); } }
const Entry ENTRIES[] = {
    ENTRY(exact_attend_64, ExactParameters),
    ENTRY(exact_attend_128, ExactParameters),
    ENTRY(exact_finish_64, FinishParameters),
    ENTRY(exact_finish_128, FinishParameters),
    ENTRY(layered_turn_64, LayeredParameters),
    ENTRY(layered_turn_128, LayeredParameters),
    ENTRY(layered_sketch_64, LayeredParameters),
    ENTRY(layered_sketch_128, LayeredParameters),
    ENTRY(layered_want, LayeredParameters),
    ENTRY(layered_list, LayeredParameters),
    ENTRY(layered_attend_64, LayeredParameters),
    ENTRY(layered_attend_128, LayeredParameters),
    ENTRY(layered_finish_64, LayeredParameters),
    ENTRY(layered_finish_128, LayeredParameters),
    ENTRY(layered_coordinates_64, CoordinatesParameters),
    ENTRY(layered_coordinates_128, CoordinatesParameters),
    ENTRY(layered_count_64, EncodeParameters),
    ENTRY(layered_count_128, EncodeParameters),
    ENTRY(layered_encode_64, EncodeParameters),
    ENTRY(layered_encode_128, EncodeParameters),
    ENTRY(packed_turn_64, PackedParameters),
    ENTRY(packed_turn_128, PackedParameters),
    ENTRY(packed_score_64, PackedParameters),
    ENTRY(packed_score_128, PackedParameters),
    ENTRY(packed_want, PackedParameters),
    ENTRY(packed_narrow, PackedParameters),
    ENTRY(packed_list, PackedParameters),
    ENTRY(packed_attend_64, PackedParameters),
    ENTRY(packed_attend_128, PackedParameters),
    ENTRY(packed_leave_64, PackedParameters),
    ENTRY(packed_leave_128, PackedParameters),
    ENTRY(packed_finish_64, PackedParameters),
    ENTRY(packed_finish_128, PackedParameters),
    ENTRY(packed_rotate_64, PackedRotateParameters),
    ENTRY(packed_rotate_128, PackedRotateParameters),
    ENTRY(packed_encode_64, PackedEncodeParameters),
    ENTRY(packed_encode_128, PackedEncodeParameters),
    ENTRY(dense_embed, EmbedParameters),
    ENTRY(dense_norm, NormParameters),
    ENTRY(dense_norm_add, NormParameters),
    ENTRY(dense_heads_64, HeadsParameters),
    ENTRY(dense_heads_128, HeadsParameters),
    ENTRY(dense_gate, GateParameters),
    ENTRY(dense_narrow, NarrowParameters),
    ENTRY(deliver, DeliverParameters),
    ENTRY(prefill_attend_64, PrefillParameters),
    ENTRY(prefill_attend_128, PrefillParameters),
};
}  // namespace

// Runs all blocks of a kernel, one after the other; 0, or 1 if there is no such kernel. One call at a time.
extern "C" int mosaickv_emulated_launch(const char* name, int blocks, int threads, size_t shared_bytes, const void* parameters) {
    for (const Entry& entry : ENTRIES) {
        if (std::strcmp(entry.name, name) == 0) {
            emulation::launch(entry.run, blocks, threads, shared_bytes, parameters);
            return 0;
        }
    }
    return 1;
}

// Memory that ends where a page ends; `bytes` is a multiple of 16. Null if there is none.
extern "C" unsigned char* mosaickv_emulated_alloc(size_t bytes) { return emulation::guarded_alloc(bytes); }
extern "C" void mosaickv_emulated_free(unsigned char* at, size_t bytes) { emulation::guarded_free(at, bytes); }
