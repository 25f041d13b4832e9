// All kernels, as one module.
#include "coordinates.cuh"
#include "deliver.cuh"
#include "dense.cuh"
#include "encode.cuh"
#include "packed_encode.cuh"
#include "prefill.cuh"

// As `src/cuda/parameters.rs` has them.
static_assert(sizeof(States) == 32 && sizeof(ExactParameters) == 88 && sizeof(FinishParameters) == 64, "sizes of structures");
static_assert(sizeof(SketchPage) == 8 && sizeof(Tile) == 32 && sizeof(Escape) == 4, "sizes of structures");
static_assert(sizeof(EncodePage) == 20 && sizeof(EncodeParameters) == 80 && sizeof(CoordinatesParameters) == 64, "sizes of structures");
static_assert(sizeof(Head) == 96 && sizeof(Selection) == 20 && sizeof(LayeredParameters) == 248, "sizes of structures");
static_assert(sizeof(PackedHead) == 16 && sizeof(PackedSegment) == 32 && sizeof(PackedSlice) == 16, "sizes of structures");
static_assert(sizeof(PackedRun) == 16 && sizeof(PackedPlan) == 8 && sizeof(PackedCut) == 8, "sizes of structures");
static_assert(sizeof(PackedParameters) == 312 && sizeof(PackedRotateParameters) == 32 && sizeof(PackedEncodeParameters) == 40,
              "sizes of structures");
static_assert(sizeof(EmbedParameters) == 40 && sizeof(NormParameters) == 48 && sizeof(HeadsParameters) == 112, "sizes of structures");
static_assert(sizeof(GateParameters) == 40 && sizeof(NarrowParameters) == 24 && sizeof(PrefillParameters) == 64, "sizes of structures");
static_assert(sizeof(DeliverPiece) == 16 && sizeof(DeliverParameters) == 8, "sizes of structures");

// As `src/cuda/exact.rs`, `src/cuda/layered.rs` and `src/cuda/encode.rs` count shared memory.
static_assert(sizeof(ExactShared<64>) == 2048 + 1024 + 8448 && sizeof(ExactShared<128>) == 2048 + 2048 + 16640, "shared memory");
static_assert(sizeof(FinishShared) == 5248 && sizeof(TurnShared) == 3328 && sizeof(LayeredFinishShared) == 8320, "shared memory");
static_assert(sizeof(EncodeShared<64>) == 4096 + 64 && sizeof(EncodeShared<128>) == 8192 + 64, "shared memory");
static_assert(sizeof(CoordinatesShared<64>) == 24576 && sizeof(CoordinatesShared<128>) == 65536, "shared memory");
static_assert(__builtin_offsetof(SketchShared, histogram) == 2176, "shared memory");
static_assert(sizeof(SelectShared) == 3148, "shared memory");
static_assert(__builtin_offsetof(LayeredShared<64>, slots) == 19328, "shared memory");
static_assert(__builtin_offsetof(LayeredShared<128>, slots) == 30080, "shared memory");
// As `src/cuda/packed.rs` and `src/cuda/packed/encode.rs` count it.
static_assert(__builtin_offsetof(ScoreShared, slots) == 2304, "shared memory");
static_assert(__builtin_offsetof(PackedShared<64>, slots) == 2304 + 6144, "shared memory");
static_assert(__builtin_offsetof(PackedShared<128>, slots) == 2304 + 12288, "shared memory");
static_assert(sizeof(PackedSelectShared) == 19532, "shared memory");
static_assert(sizeof(TurnPackedShared<64>) == 2048 + 6144 + 64 && sizeof(TurnPackedShared<128>) == 4096 + 12288 + 64, "shared memory");
static_assert(sizeof(PackedEncodeShared<48>) == 1536 && sizeof(PackedEncodeShared<96>) == 3072, "shared memory");
static_assert(sizeof(PrefillShared<64>) == 49152 && sizeof(PrefillShared<128>) == 98304, "shared memory, of which two blocks fit");
