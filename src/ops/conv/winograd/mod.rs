//! 3x3 convolution of stride 1 by Winograd's minimal filtering F(MxM, 3x3) (Lavin and Gray, CVPR 2016), forward and for
//! both gradients. A tile of 4x4 outputs takes 36 products where the definition takes 144; 3x3 takes 25 instead of 81,
//! 2x2 16 instead of 36.
//!
//! A worker thread transforms some rows of tiles, multiplies them by the transformed filter position by position, and
//! transforms the products back; everything between input and output stays in its cache. If there are too few rows for
//! all threads, or the filter is too large for the cache, the threads share each of the three phases in turn. Sums run
//! in an order that depends on the sizes only.

mod convolve;
mod filter;
mod grad_w;
mod tiles;
mod transform;

use pulp::Arch;

pub(super) use self::convolve::convolve;
pub(super) use self::filter::{filter_len, pack};
pub(super) use self::grad_w::grad_w;
use self::tiles::Tiling;
use super::Dims;
use super::kernel::{CHANNELS, Epilogue, Prologue};
use crate::ops::scratch::with_scratch;

/// Side of a tile in output pixels. Large tiles save the most products; small ones have smaller filters and extend less
/// beyond the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tile {
    Two = 2,
    Three = 3,
    Four = 4,
}

impl Tile {
    pub const ALL: [Self; 3] = [Self::Two, Self::Three, Self::Four];

    fn side(self) -> usize {
        self as usize
    }

    /// Products of a tile for each pair of input and output channels.
    fn positions(self) -> usize {
        (self.side() + 2).pow(2)
    }
}

/// Whether a convolution can be computed by minimal filtering.
pub(super) fn fits(d: Dims) -> bool {
    (d.kh, d.kw, d.stride, d.groups) == (3, 3, 1, 1)
        && d.padding <= 2
        && d.c.is_multiple_of(CHANNELS)
        && d.co.is_multiple_of(CHANNELS)
        && d.ho >= 3
        && d.wo >= 3
}

/// Returns the fastest tile; `None` if minimal filtering is not supported or gathered patches are faster. With few
/// pixels it does not pay to read a transformed filter, up to four times as large, from memory.
pub(super) fn fastest(d: Dims) -> Option<Tile> {
    if !fits(d) {
        return None;
    }
    // Cost in multiplications and additions per input and output channel; transforms and reads of filters count as the
    // operations that take the same time.
    let reading = |positions: usize| if positions * d.c * d.co <= CACHED_FILTER { 0 } else { READING * positions };
    let cost = |tile: Tile| {
        let of_tile = match tile {
            Tile::Two => 32 + 10,
            Tile::Three => 50 + 10,
            Tile::Four => 72 + 28,
        };
        Tiling::new(d, tile.side()).num_tiles() * of_tile + reading(tile.positions())
    };
    let tile = Tile::ALL.into_iter().min_by_key(|&tile| cost(tile))?;
    (cost(tile) <= 18 * d.pixels() + reading(9)).then_some(tile)
}

/// Largest number of elements of transformed tiles and their products at a time when threads share the phases: memory
/// must not grow with the batch.
const MAX_GROUP: usize = 4 << 20;

/// Number of tiles that are transformed at a time when threads share the phases.
fn group_tiles(num_positions: usize, d: Dims) -> usize {
    (MAX_GROUP / num_positions / (d.c + d.co)).max(1)
}

/// Elements of the largest filter that stays in the caches.
const CACHED_FILTER: usize = 1 << 19;
/// Cost of reading a filter's element from memory, in multiplications and additions.
const READING: usize = 70;

/// Writes the gradient of the input, which is a convolution of the output's gradient, passed through `epilogue`, to
/// `gx`.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, tile: Tile, arch: Arch, epilogue: Epilogue, gx: &mut [f32]) {
    let back = Dims { h: d.ho, w: d.wo, c: d.co, ho: d.h, wo: d.w, co: d.c, padding: 2 - d.padding, ..d };
    with_scratch(filter_len(back, tile, arch), |packed| {
        filter::pack_flipped(w, d, tile, arch, packed);
        convolve(gy, packed, back, tile, arch, (Prologue::default(), epilogue), gx);
    });
}
