//! 3x3 convolution of stride 1 by Winograd's minimal filtering F(MxM, 3x3) (Lavin and Gray, CVPR 2016): with tiles of 4x4
//! outputs 36 products where the definition has 144, with 3x3 25 for 81, with 2x2 16 for 36; forward and for both gradients.
//!
//! A worker transforms some rows of tiles, multiplies them with the transformed filter position by position, and
//! transforms back: everything between the two images stays in its cache. Where there are fewer rows than workers, the
//! three phases are shared out one after the other. Sums run in an order that depends on the sizes only.

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

/// Output pixels of a tile in either direction: large ones save most products, small ones have small filters and hang
/// over less.
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

    /// Products of a tile for each input and output channel.
    fn positions(self) -> usize {
        (self.side() + 2).pow(2)
    }
}

/// Whether a convolution can be computed this way.
pub(super) fn fits(d: Dims) -> bool {
    (d.kh, d.kw, d.stride, d.groups) == (3, 3, 1, 1)
        && d.padding <= 2
        && d.c.is_multiple_of(CHANNELS)
        && d.co.is_multiple_of(CHANNELS)
        && d.ho >= 3
        && d.wo >= 3
}

/// The fastest tile; none where this way does not fit, or the definition by patches is faster: few pixels do not pay for reading a transformed filter
/// from memory, which is up to four times as large.
pub(super) fn fastest(d: Dims) -> Option<Tile> {
    if !fits(d) {
        return None;
    }
    // In multiplications and additions per input and output channel; transforms and the reading of filters in what is done
    // in their time.
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

/// Elements of transformed tiles and their products that are there at once where the workers share them out: memory must not grow with
/// the batch.
const MAX_GROUP: usize = 4 << 20;

/// Tiles that are transformed at once where the workers share them out.
fn group_tiles(num_positions: usize, d: Dims) -> usize {
    (MAX_GROUP / num_positions / (d.c + d.co)).max(1)
}

/// Elements of a filter that caches hold.
const CACHED_FILTER: usize = 1 << 19;
/// What reading an element of a filter from memory costs, in multiplications and additions.
const READING: usize = 70;

/// Writes the gradient of the input, itself a convolution of the output's gradient, and `epilogue` of it to `gx`.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, tile: Tile, arch: Arch, epilogue: Epilogue, gx: &mut [f32]) {
    let back = Dims { h: d.ho, w: d.wo, c: d.co, ho: d.h, wo: d.w, co: d.c, padding: 2 - d.padding, ..d };
    with_scratch(filter_len(back, tile, arch), |packed| {
        filter::pack_flipped(w, d, tile, arch, packed);
        convolve(gy, packed, back, tile, arch, (Prologue::default(), epilogue), gx);
    });
}
