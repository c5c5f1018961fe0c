#pragma once

#include <cstddef>
#include <cstdint>

namespace hestia {

/// Bytes that a host thread copies of a guessed expert at once; the last piece of a blob is what is left.
inline constexpr std::size_t kPrefetchPiece = std::size_t{256} << 10;
/// Most pieces of one guess.
inline constexpr std::uint32_t kPrefetchMostPieces = 255;
/// Tags of guesses: 1 to this, and again from 1.
inline constexpr std::uint32_t kPrefetchTags = (1U << 24) - 1;

/// What guessing did since it was zero.
struct PrefetchCounts {
  std::int64_t guesses = 0;  ///< Layers of a step for which an expert was guessed,
  std::int64_t right = 0;    ///< and of these, those whose step then missed it.
};

/// Guesses at an expert that the next layer will miss: a layer's router makes one (DecodeRouterInputs::guess), a host
/// thread copies what it can of it into a staging place meanwhile (CopyRequest::guess), and the next layer's fetching
/// kernel moves that into the slot. Zero before the first use; layers of even and odd number have a place each, so that
/// one is read while the other is filled. One decoder's, in the memory of the kernels.
struct PrefetchState {
  struct Guess {
    std::uint32_t expert = 0;  ///< 1 + the expert; 0: none
    std::uint32_t tag = 0;
  };
  /// Of the host thread, once it has been asked for a guessed expert and behind the last piece of it: the guess's
  /// tag << 8 | pieces that are there. Put back to 0 by the kernel that reads it.
  std::uint32_t landed[2] = {};
  std::uint32_t tag = 0;  ///< Of the last guess; it goes on from one sequence to the next.
  /// A guess is told of once the router has asked for the layer's own loads, if it does: who of both is there.
  std::uint32_t met = 0;
  Guess guesses[2];
  PrefetchCounts counts;
};

}  // namespace hestia
