//! f32 convolutions: each uses the method that suits its sizes, between a prologue and an epilogue.

use candle_core::{Result, Shape};
use pulp::Arch;

use super::kernel::{CHANNELS, Epilogue, Prologue};
use super::winograd::{self, Tile};
use super::{ConvConfig, Dims, depthwise, direct, patches};
use crate::ops::scratch::with_scratch;
use crate::vectors;

/// Algorithm of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Winograd(Tile),
    Patches,
    Depthwise,
    Direct,
}

/// An f32 convolution of given sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conv {
    d: Dims,
    method: Method,
    arch: Arch,
}

/// A filter in the order in which its method reads it.
#[derive(Debug)]
pub(crate) struct Filter {
    packed: Vec<f32>,
    method: Method,
}

impl Conv {
    /// Returns the convolution of `x: (n, h, w, c)` with `w: (co, c / groups, kh, kw)`.
    ///
    /// # Errors
    /// When the sizes do not match.
    pub fn new(x: [usize; 4], w: [usize; 4], config: ConvConfig) -> Result<Self> {
        Ok(Self::of(Dims::new(&Shape::from(&x), &Shape::from(&w), config)?))
    }

    /// Like [`Self::new`], with the method that the filter was packed for.
    ///
    /// # Errors
    /// Same as [`Self::new`].
    pub fn of_filter(x: [usize; 4], w: [usize; 4], config: ConvConfig, filter: &Filter) -> Result<Self> {
        Ok(Self { method: filter.method, ..Self::new(x, w, config)? })
    }

    pub(super) fn of(d: Dims) -> Self {
        let method = if let Some(tile) = winograd::fastest(d) {
            Method::Winograd(tile)
        } else if depthwise::fits(d) {
            Method::Depthwise
        } else if patches::fits(d) {
            Method::Patches
        } else {
            Method::Direct
        };
        Self { d, method, arch: vectors::arch() }
    }

    /// Whether vectors of input channels are full, which a prologue and [`Self::grad_x`] need but for the direct
    /// method.
    fn has_whole_channels(&self) -> bool {
        self.d.c.is_multiple_of(CHANNELS)
    }

    /// Packs `w` once for many calls.
    pub fn pack(&self, w: &[f32]) -> Filter {
        let mut packed = vec![0.0; self.filter_len()];
        self.pack_into(w, &mut packed);
        Filter { packed, method: self.method }
    }

    /// Writes `epilogue(conv(prologue(x), w))` to `y`.
    pub fn forward(&self, x: &[f32], prologue: Prologue, w: &[f32], epilogue: Epilogue, y: &mut [f32]) {
        with_scratch(self.filter_len(), |packed| {
            self.pack_into(w, packed);
            self.convolve(x, prologue, packed, epilogue, y);
        });
    }

    /// Like [`Self::forward`], with a packed filter.
    ///
    /// # Panics
    /// When the filter was packed for another method or other channels.
    pub fn forward_packed(&self, x: &[f32], prologue: Prologue, filter: &Filter, epilogue: Epilogue, y: &mut [f32]) {
        assert!(filter.method == self.method && filter.packed.len() == self.filter_len(), "filter of another method");
        self.convolve(x, prologue, &filter.packed, epilogue, y);
    }

    /// Writes the gradient with respect to `prologue(x)`, passed through `epilogue`, to `gx`.
    pub fn grad_x(&self, gy: &[f32], w: &[f32], epilogue: Epilogue, gx: &mut [f32]) {
        match self.method {
            _ if !self.has_whole_channels() => direct::grad_x(gy, w, self.d, epilogue, gx),
            Method::Direct => direct::grad_x(gy, w, self.d, epilogue, gx),
            Method::Winograd(tile) => winograd::grad_x(gy, w, self.d, tile, self.arch, epilogue, gx),
            Method::Patches => patches::grad_x(gy, w, self.d, self.arch, epilogue, gx),
            Method::Depthwise => depthwise::grad_x(gy, w, self.d, self.arch, epilogue, gx),
        }
    }

    /// Writes the gradient of the weight.
    pub fn grad_w(&self, x: &[f32], prologue: Prologue, gy: &[f32], gw: &mut [f32]) {
        self.prepared(x, prologue, |x, prologue| match self.method {
            Method::Winograd(_) => winograd::grad_w(x, prologue, gy, self.d, self.arch, gw),
            Method::Patches => patches::grad_w(x, prologue, gy, self.d, self.arch, gw),
            Method::Depthwise => depthwise::grad_w(x, prologue, gy, self.d, self.arch, gw),
            Method::Direct => direct::grad_w(x, gy, self.d, gw),
        });
    }

    fn filter_len(&self) -> usize {
        match self.method {
            Method::Winograd(tile) => winograd::filter_len(self.d, tile, self.arch),
            Method::Patches => patches::filter_len(self.d, self.arch),
            Method::Depthwise => depthwise::filter_len(self.d),
            Method::Direct => self.d.w_shape().elem_count(),
        }
    }

    fn pack_into(&self, w: &[f32], packed: &mut [f32]) {
        assert_eq!(w.len(), self.d.w_shape().elem_count(), "a weight for {:?}", self.d);
        match self.method {
            Method::Winograd(tile) => winograd::pack(w, self.d, tile, self.arch, packed),
            Method::Patches => patches::pack(w, self.d, self.arch, packed),
            Method::Depthwise => depthwise::pack(w, self.d, packed),
            Method::Direct => packed.copy_from_slice(w),
        }
    }

    fn convolve(&self, x: &[f32], prologue: Prologue, packed: &[f32], epilogue: Epilogue, y: &mut [f32]) {
        self.prepared(x, prologue, |x, prologue| {
            let around = (prologue, epilogue);
            match self.method {
                Method::Winograd(tile) => winograd::convolve(x, packed, self.d, tile, self.arch, around, y),
                Method::Patches => patches::convolve(x, packed, self.d, self.arch, around, y),
                Method::Depthwise => depthwise::convolve(x, packed, self.d, self.arch, around, y),
                Method::Direct => direct::convolve(x, packed, self.d, epilogue, y),
            }
        });
    }

    /// Calls `f` with the input and the prologue, or with a copy that the prologue was applied to where `f` cannot.
    fn prepared(&self, x: &[f32], prologue: Prologue, f: impl FnOnce(&[f32], Prologue)) {
        if prologue.is_identity() || (self.has_whole_channels() && self.method != Method::Direct) {
            return f(x, prologue);
        }
        assert!(prologue.fits(self.d.c), "a prologue for {:?}", self.d);
        with_scratch(x.len(), |copy| {
            direct::prepare(x, prologue, self.d.c, copy);
            f(copy, Prologue::default());
        });
    }

    /// The same convolution with the vectors of another machine.
    #[cfg(test)]
    pub(super) fn on(self, arch: Arch) -> Self {
        Self { arch, ..self }
    }

    /// The same convolution by Winograd's minimal filtering.
    #[cfg(test)]
    pub(super) fn by_winograd(self, tile: Tile) -> Self {
        assert!(winograd::fits(self.d));
        Self { method: Method::Winograd(tile), ..self }
    }

    /// The same convolution as products of gathered patches.
    #[cfg(test)]
    pub(super) fn by_patches(self) -> Self {
        assert!(patches::fits(self.d));
        Self { method: Method::Patches, ..self }
    }

    #[cfg(test)]
    pub(super) fn method(&self) -> String {
        format!("{:?}", self.method)
    }
}
