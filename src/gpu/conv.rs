//! Channels-last convolutions by patches (im2col) and matrix products; those of small groups by direct kernels
//! (`kernels/conv.cu`).

use candle_core::{Result, bail};

use super::{Arg, Array, Convolution, Element, Launch, Pass, Product, fits, rows};

/// Threads per block.
const BLOCK: usize = 256;
/// Maximum bytes of patches held at once, unless one image alone has more.
const MAX_PATCH_BYTES: usize = 64 << 20;
/// Maximum number of blocks that share the pixels in the gradient of grouped filters; its rounding depends on it.
const MAX_CHUNKS: usize = 128;

/// Sizes of a convolution: input `x: (n, h, w, c)`, square filters `(co, k, k, c)`, or `(k, k, m, c)` for groups of `m`
/// channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Conv {
    pub x: [usize; 4],
    pub co: usize,
    pub k: usize,
    pub stride: usize,
    pub padding: usize,
    /// Channels per group, as many in as out: 1 for a depthwise convolution, none without groups.
    pub group: Option<usize>,
}

impl std::fmt::Display for Conv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { x: [n, h, w, c], co, k, stride, .. } = self;
        write!(f, "{n} x {h} x {w} x {c} to {co}, {k} x {k}")?;
        if *stride > 1 {
            write!(f, " / {stride}")?;
        }
        Ok(())
    }
}

impl Conv {
    /// Shape of the output, `(n, h, w, c)`.
    pub fn y(&self) -> [usize; 4] {
        let out = |size: usize| (size + 2 * self.padding - self.k) / self.stride + 1;
        [self.x[0], out(self.x[1]), out(self.x[2]), self.co]
    }

    /// Number of elements of all filters.
    pub fn num_weights(&self) -> usize {
        self.patch() * self.group.unwrap_or(self.co)
    }

    /// Number of elements of a patch over all channels.
    fn patch(&self) -> usize {
        self.k * self.k * self.x[3]
    }

    /// Whether the input is already the matrix of patches.
    fn is_pointwise(&self) -> bool {
        self.k == 1 && self.stride == 1 && self.padding == 0
    }

    fn check(&self, x: &Array, w: &Array, y: &Array) -> Result<()> {
        let per_access = x.element().per_access();
        let is_whole = self.x[3].is_multiple_of(per_access) && self.co.is_multiple_of(per_access);
        let has_sizes = x.len() == self.x.iter().product::<usize>() && y.len() == self.y().iter().product::<usize>();
        let is_grouped = self.group.is_none_or(|m| m > 0 && per_access.is_multiple_of(m) && self.co == self.x[3]);
        if !is_whole || !has_sizes || w.len() != self.num_weights() || !is_grouped || x.element() != y.element() {
            bail!(
                "conv: {self:?} does not fit an input of {} {:?}, filters of {} and an output of {} elements",
                x.len(),
                x.element(),
                w.len(),
                y.len()
            );
        }
        Ok(())
    }

    /// The same convolution for `n` images.
    fn of_images(&self, n: usize) -> Self {
        Self { x: [n, self.x[1], self.x[2], self.x[3]], ..*self }
    }

    /// First image and number of images of each run; a run's patches are held at once.
    fn runs(&self, element: Element) -> impl Iterator<Item = (usize, usize)> + use<> {
        let [n, ho, wo, _] = self.y();
        let of_image = ho * wo * self.patch() * element.bytes();
        let run = if self.is_pointwise() { n } else { (MAX_PATCH_BYTES / of_image).clamp(1, n.max(1)) };
        (0..n).step_by(run.max(1)).map(move |first| (first, run.min(n - first)))
    }

    /// Runs a pass with the device's library; returns false if it has none for it.
    fn by_library(&self, pass: Pass, x: &Array, w: &Array, y: &Array) -> Result<bool> {
        self.check(x, w, y)?;
        fits("conv", x.element(), &[(Some(w), w.len())])?;
        // SAFETY: the arrays have the convolution's sizes and one type.
        unsafe { x.device().gpu().convolve(&Convolution { conv: self, pass, x, w, y }) }
    }

    fn args(&self) -> [Arg<'static>; 9] {
        let [n, h, w, c] = self.x;
        let [_, ho, wo, _] = self.y();
        let sizes = [h, w, c, ho, wo, self.k, self.stride, self.padding].map(|size| Arg::I32(size as i32));
        let [a, b, c, d, e, f, g, i] = sizes;
        [Arg::I64(n as i64), a, b, c, d, e, f, g, i]
    }

    /// Launches a kernel with one thread per access of an array `(n, h, w, c)`.
    ///
    /// # Safety
    /// The arrays have one type and the sizes that the kernel takes from the convolution.
    unsafe fn launch(&self, kernel: &str, [n, h, w, c]: [usize; 4], inputs: &[&Array], output: &Array) -> Result<()> {
        let threads = n * h * w * (c / output.element().per_access());
        let launch = Launch { grid: [threads.div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
        let inputs = inputs.iter().map(|x| x.arg());
        let group = self.group.map(|m| Arg::I32(m as i32));
        let args: Vec<Arg> = inputs.chain(self.args()).chain(group).chain([output.arg()]).collect();
        // SAFETY: by this function's contract.
        unsafe { output.device().launch(&format!("conv_{kernel}_{}", output.element().suffix()), launch, &args) }
    }

    /// The patches of `x: (n, h, w, c)` as rows of a matrix.
    fn patches(&self, x: &Array) -> Result<Array> {
        if self.is_pointwise() {
            return Ok(x.clone());
        }
        let [n, ho, wo, _] = self.y();
        let patches = x.device().array(x.element(), n * ho * wo * self.patch())?;
        fits("conv", x.element(), &[(Some(x), self.x.iter().product())])?;
        // SAFETY: x has the convolution's size, the patches that of all its windows.
        unsafe { self.launch("gather", [n, ho, wo, self.x[3]], &[x], &patches)? };
        Ok(patches)
    }

    /// Writes the output to `y`.
    pub fn forward(&self, x: &Array, w: &Array, y: &Array) -> Result<()> {
        self.check(x, w, y)?;
        if self.group.is_some() {
            fits("conv", x.element(), &[(Some(w), w.len())])?;
            // SAFETY: the arrays were checked.
            return unsafe { self.launch("grouped", self.y(), &[x, w], y) };
        }
        if self.by_library(Pass::Forward, x, w, y)? {
            return Ok(());
        }
        for (first, n) in self.runs(x.element()) {
            let run = self.of_images(n);
            let (x, y) = (images(x, first, run.x), images(y, first, run.y()));
            let (patches, k, m) = (run.patches(&x)?, run.patch(), y.len() / self.co);
            let product = Product {
                m,
                n: self.co,
                k,
                a: patches.matrix(k),
                b: w.matrix(k).transposed(),
                c: y.matrix(self.co),
                alpha: 1.0,
                beta: 0.0,
            };
            x.device().multiply(&product)?;
        }
        Ok(())
    }

    /// Writes the gradient of `x` from that of `y`.
    pub fn grad_x(&self, gy: &Array, w: &Array, gx: &Array) -> Result<()> {
        self.check(gx, w, gy)?;
        if self.group.is_some() {
            fits("conv", gx.element(), &[(Some(w), w.len())])?;
            // SAFETY: the arrays were checked.
            return unsafe { self.launch("grouped_grad_x", self.x, &[gy, w], gx) };
        }
        if self.by_library(Pass::GradX, gx, w, gy)? {
            return Ok(());
        }
        for (first, n) in self.runs(gx.element()) {
            let run = self.of_images(n);
            let (gx, gy) = (images(gx, first, run.x), images(gy, first, run.y()));
            let (k, m) = (run.patch(), gy.len() / self.co);
            let patches = if run.is_pointwise() { gx.clone() } else { gx.device().array(gx.element(), m * k)? };
            let product = Product {
                m,
                n: k,
                k: self.co,
                a: gy.matrix(self.co),
                b: w.matrix(k),
                c: patches.matrix(k),
                alpha: 1.0,
                beta: 0.0,
            };
            gx.device().multiply(&product)?;
            if !run.is_pointwise() {
                // SAFETY: gx has the size of the run's images, the patches that of all their windows.
                unsafe { run.launch("scatter", run.x, &[&patches], &gx)? };
            }
        }
        Ok(())
    }

    /// Writes the gradient of the filters, f32, from `x` and the gradient of `y`.
    pub fn grad_w(&self, x: &Array, gy: &Array, gw: &Array) -> Result<()> {
        self.check(x, gw, gy)?;
        if let Some(m) = self.group {
            return self.grouped_grad_w(x, gy, m, gw);
        }
        // The library's gradient has the type of the input.
        let of_library =
            if x.element() == Element::F32 { gw.clone() } else { gw.device().array(x.element(), gw.len())? };
        if self.by_library(Pass::GradW, x, &of_library, gy)? {
            return if x.element() == Element::F32 { Ok(()) } else { rows::convert(&of_library, gw) };
        }
        for (first, n) in self.runs(x.element()) {
            let run = self.of_images(n);
            let (x, gy) = (images(x, first, run.x), images(gy, first, run.y()));
            let (patches, k, pixels) = (run.patches(&x)?, run.patch(), gy.len() / self.co);
            let product = Product {
                m: self.co,
                n: k,
                k: pixels,
                a: gy.matrix(self.co).transposed(),
                b: patches.matrix(k),
                c: gw.matrix(k),
                alpha: 1.0,
                beta: if first == 0 { 0.0 } else { 1.0 },
            };
            x.device().multiply(&product)?;
        }
        Ok(())
    }

    fn grouped_grad_w(&self, x: &Array, gy: &Array, m: usize, gw: &Array) -> Result<()> {
        let (c, taps, pixels) = (self.co, self.k * self.k * m, gy.len() / self.co);
        let groups = c / x.element().per_access();
        if groups > BLOCK {
            bail!("conv: {c} channels of {:?} are more than a block of threads can take", x.element());
        }
        let lines = BLOCK / groups;
        let chunk = pixels.div_ceil(MAX_CHUNKS).max(4 * lines);
        let chunks = pixels.div_ceil(chunk);
        let parts = x.device().array(Element::F32, chunks * taps * c)?;
        let shared_bytes = (lines * c * 4) as u32;
        let launch = Launch { grid: [chunks as u32, taps as u32], block: BLOCK as u32, shared_bytes };
        let pointers = [x.arg(), gy.arg()].into_iter();
        let args: Vec<Arg> =
            pointers.chain(self.args()).chain([Arg::I32(m as i32), Arg::I64(chunk as i64), parts.arg()]).collect();
        // SAFETY: `grad_w` checked x and gy, and each chunk has its own sums for each tap and channel.
        unsafe { x.device().launch(&format!("conv_grouped_grad_w_{}", x.element().suffix()), launch, &args)? };
        rows::sum(&parts, gw)
    }
}

/// `shape[0]` images of `x` from `first` on.
fn images(x: &Array, first: usize, shape: [usize; 4]) -> Array {
    let of_image: usize = shape[1..].iter().product();
    x.part(first * of_image, shape[0] * of_image)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device as Candle, Tensor};

    use super::*;
    use crate::gpu::Planned;
    use crate::gpu::tests::{ELEMENTS, close, device, numbers, rounded, rounds_gradients, upload};
    use crate::ops::conv::{ConvConfig, conv2d, conv2d_grad_w, conv2d_grad_x};

    fn conv(x: [usize; 4], co: usize, [k, stride, padding]: [usize; 3], group: Option<usize>) -> Conv {
        Conv { x, co, k, stride, padding, group }
    }

    /// With and without padding, strides, one pixel, sizes that the stride does not divide, 1x1 filters, groups of one,
    /// two and four channels.
    fn cases() -> Vec<Conv> {
        vec![
            conv([2, 7, 5, 8], 16, [3, 1, 1], None),
            conv([1, 1, 1, 8], 8, [3, 1, 1], None),
            conv([3, 9, 8, 16], 8, [3, 2, 1], None),
            conv([2, 6, 7, 24], 8, [1, 1, 0], None),
            conv([2, 7, 7, 8], 24, [1, 2, 0], None),
            conv([2, 7, 6, 16], 16, [3, 1, 1], Some(1)),
            conv([2, 8, 9, 40], 40, [3, 2, 1], Some(1)),
            conv([5, 7, 7, 16], 16, [7, 1, 0], Some(1)),
            conv([2, 7, 6, 16], 16, [3, 1, 1], Some(2)),
            conv([3, 5, 9, 24], 24, [3, 2, 1], Some(4)),
        ]
    }

    /// Filters from `(co, k, k, c)` to PyTorch's `(co, c, k, k)`, or for groups from `(k, k, m, c)` to `(c, m, k, k)`.
    fn to_oihw(conv: &Conv, w: &[f32]) -> Result<Tensor> {
        let Conv { co, k, .. } = *conv;
        if let Some(m) = conv.group {
            return Tensor::from_slice(w, (k, k, m, co), &Candle::Cpu)?.permute((3, 2, 0, 1))?.contiguous();
        }
        Tensor::from_slice(w, (co, k, k, conv.x[3]), &Candle::Cpu)?.permute((0, 3, 1, 2))?.contiguous()
    }

    fn from_oihw(conv: &Conv, w: &Tensor) -> Result<Vec<f32>> {
        let order = if conv.group.is_some() { (2, 3, 1, 0) } else { (0, 2, 3, 1) };
        w.permute(order)?.contiguous()?.flatten_all()?.to_vec1()
    }

    #[test]
    fn convolutions_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, conv) in ELEMENTS.into_iter().flat_map(|e| cases().into_iter().map(move |conv| (e, conv))) {
            let [x_len, y_len] = [conv.x, conv.y()].map(|shape| shape.iter().product::<usize>());
            let x = rounded(&numbers("x", x_len, [-1.0, 1.0]), element);
            let w = rounded(&numbers("w", conv.num_weights(), [-1.0, 1.0]), element);
            let gy = rounded(&numbers("gy", y_len, [-1.0, 1.0]), element);
            let groups = conv.group.map_or(1, |m| conv.co / m);
            let config = ConvConfig { stride: conv.stride, padding: conv.padding, groups };
            let on_cpu = Tensor::from_slice(&x, &conv.x, &Candle::Cpu)?;
            let (w_cpu, gy_cpu) = (to_oihw(&conv, &w)?, Tensor::from_slice(&gy, &conv.y(), &Candle::Cpu)?);
            let flat = |x: Tensor| x.flatten_all()?.to_vec1::<f32>();
            let [on_x, on_w, on_gy] = [&x, &w, &gy].map(|values| upload(&device, values, element));
            let (on_x, on_w, on_gy) = (on_x?, on_w?, on_gy?);
            let (y, gx) = (device.array(element, y_len)?, device.array(element, x_len)?);
            conv.forward(&on_x, &on_w, &y)?;
            close("y", &y, &flat(conv2d(&on_cpu, &w_cpu, config)?)?, 1e-5)?;
            conv.grad_x(&on_gy, &on_w, &gx)?;
            // The patches' gradients are rounded before they are added.
            let tol = if element == Element::F32 || conv.group.is_some() { 1e-5 } else { 0.01 };
            close("gx", &gx, &flat(conv2d_grad_x(&gy_cpu, &w_cpu, on_cpu.shape(), config)?)?, tol)?;
            let gw = device.array(Element::F32, conv.num_weights())?;
            conv.grad_w(&on_x, &on_gy, &gw)?;
            let expected = conv2d_grad_w(&on_cpu, &gy_cpu, w_cpu.shape(), config)?;
            let tol = match element {
                Element::Bf16 if conv.group.is_none() && rounds_gradients() => 1.0 / 256.0,
                Element::F16 if conv.group.is_none() && rounds_gradients() => 1.0 / 2048.0,
                _ => 1e-5,
            };
            close("gw", &gw, &from_oihw(&conv, &expected)?, tol)?;
        }
        if rounds_gradients() {
            let planned = device.gpu().planned();
            for (element, pass) in ELEMENTS.into_iter().flat_map(|e| Pass::ALL.map(|pass| (e, pass))) {
                let fits = |plan: &&Planned| plan.element == element && plan.pass == pass && plan.algorithm.is_some();
                assert!(planned.iter().any(|plan| fits(&plan)), "the library computes no {pass:?} of {element:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn runs_of_images_cover_the_batch_once() {
        let large = conv([300, 112, 112, 64], 64, [3, 1, 1], None);
        let runs: Vec<_> = large.runs(Element::Bf16).collect();
        assert!(runs.len() > 1 && runs.iter().map(|(_, n)| n).sum::<usize>() == 300);
        assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0));
        assert_eq!(conv([300, 112, 112, 64], 64, [1, 1, 0], None).runs(Element::F32).collect::<Vec<_>>(), [(0, 300)]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_an_error() -> Result<()> {
        let device = device();
        let conv = conv([1, 4, 4, 12], 8, [3, 1, 1], None);
        let [x, w, y] = [4 * 4 * 12, 8 * 9 * 12, 4 * 4 * 8].map(|len| device.zeros(Element::Bf16, len));
        let error = conv.forward(&x?, &w?, &y?).unwrap_err().to_string();
        assert!(error.contains("12") && error.starts_with("conv:"), "{error}");
        Ok(())
    }
}
