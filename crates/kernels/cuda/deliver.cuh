// What the host has written before a step, to where it belongs: out of page-locked memory of the host, which the device reads itself.
#pragma once

#include "device.cuh"
#include "parameters.cuh"

constexpr int DELIVER_THREADS = 256;

// A block for each piece, in turn. Pieces are of whole words, and begin at 16 bytes in the letter.
KERNEL(deliver, DeliverParameters, DELIVER_THREADS, 4) {
    follow();
    const uint64_t* head = reinterpret_cast<const uint64_t*>(p.letter);
    const DeliverPiece* pieces = reinterpret_cast<const DeliverPiece*>(p.letter + head[1]);
    for (uint64_t i = block_index(); i < head[0]; i += grid_blocks()) {
        const DeliverPiece piece = pieces[i];
        const unsigned char* from = p.letter + piece.from;
        unsigned char* to = reinterpret_cast<unsigned char*>(piece.to);
        if ((piece.to | piece.bytes) % 16 == 0) {
            for (uint32_t at = thread_index() * 16; at < piece.bytes; at += DELIVER_THREADS * 16)
                *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
        } else {
            for (uint32_t at = thread_index() * 4; at < piece.bytes; at += DELIVER_THREADS * 4)
                *reinterpret_cast<uint32_t*>(to + at) = *reinterpret_cast<const uint32_t*>(from + at);
        }
    }
}
