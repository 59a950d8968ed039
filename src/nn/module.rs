//! Networks as ordinary candle modules: each operation of a graph by itself, in f32 or f64, with candle's automatic
//! differentiation. The engine is tested against it. On other devices than the CPU, convolutions, norms and PReLU are
//! candle's own operations, which the tests run on the CPU.

use candle_core::{D, DType, Result, Tensor, bail};

use super::graph::{Graph, Node, NodeId, Op};
use super::params::Params;
use crate::ops::batch_norm::{EPS, MOMENTUM, Stats, StatsOrigin, batch_norm, batch_stats};
use crate::ops::conv::conv2d;
use crate::ops::pool::Window;
use crate::ops::prelu::prelu;

impl Graph {
    /// Returns the output of the network with these parameters: of a face network, the embeddings `(N, size)` of images
    /// `(N, 3, H, W)` of the parameters' dtype and device. Training uses dropout and the statistics of the batch, which
    /// update the running ones unless those are frozen ([`Params::freeze_statistics`]).
    ///
    /// # Errors
    /// When the images or a parameter do not fit, or in training a norm gets only one value per channel.
    pub fn forward_t(&self, params: &Params, images: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.all_forward_t(params, images, train)?.swap_remove(0))
    }

    /// Like [`Self::forward_t`], for every output: maps are `(N, H, W, C)`.
    ///
    /// # Errors
    /// Same as [`Self::forward_t`].
    pub fn all_forward_t(&self, params: &Params, images: &Tensor, train: bool) -> Result<Vec<Tensor>> {
        let mut last_uses = vec![0; self.nodes().len()];
        for (i, node) in self.nodes().iter().enumerate() {
            node.inputs.iter().for_each(|input| last_uses[*input] = i);
        }
        let outputs = self.outputs();
        outputs.iter().for_each(|output| last_uses[*output] = self.nodes().len());
        let mut values: Vec<Option<Tensor>> = Vec::with_capacity(self.nodes().len());
        for (i, node) in self.nodes().iter().enumerate() {
            let inputs: Vec<Tensor> = node.inputs.iter().filter_map(|input| values[*input].clone()).collect();
            node.inputs.iter().filter(|input| last_uses[**input] == i).for_each(|input| values[*input] = None);
            values.push(Some(match node.op {
                Op::Input => channels_last(images)?,
                _ => node.forward_t(params, &inputs, train)?,
            }));
        }
        let output = |id: &NodeId| values[*id].clone().ok_or_else(|| candle_core::Error::msg(format!("no value {id}")));
        outputs.iter().map(output).collect()
    }
}

impl Node {
    /// Returns the node's result, channels last.
    fn forward_t(&self, params: &Params, inputs: &[Tensor], train: bool) -> Result<Tensor> {
        let [x, rest @ ..] = inputs else { bail!("{:?} without an input", self.op) };
        let param = |name: &str| params.tracked(&self.param(name));
        match (&self.op, rest) {
            (Op::Conv2d(config), []) => conv2d(x, &param("weight")?, *config),
            (Op::BatchNorm, []) => self.batch_norm(params, x, train),
            (Op::PRelu, []) => prelu(x, &param("weight")?),
            (Op::Linear { has_bias }, []) => {
                let y = x.matmul(&param("weight")?.t()?)?;
                if *has_bias { y.broadcast_add(&param("bias")?) } else { Ok(y) }
            }
            (Op::Flatten, []) => x.permute((0, 3, 1, 2))?.flatten_from(1),
            (Op::Dropout, []) => {
                let mask = params.dropout().filter(|_| train).and_then(|dropout| dropout.mask(x.elem_count()));
                match mask {
                    Some(mask) => x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?,
                    None => Ok(x.clone()),
                }
            }
            (Op::Add, [other]) => x + other,
            (Op::Mul, [scale]) => x.broadcast_mul(scale),
            (Op::GlobalAveragePool, []) => {
                let (n, h, w, c) = x.dims4()?;
                x.reshape((n, h * w, c))?.mean(1)?.reshape((n, 1, 1, c))
            }
            (Op::MaxPool(window), []) => max_pool(x, *window),
            (Op::Upsample { factor }, []) => upsample(x, *factor),
            (Op::Concat, _) => Tensor::cat(inputs, D::Minus1),
            (Op::Relu, []) => x.relu(),
            (Op::Sigmoid, []) => candle_nn::ops::sigmoid(x),
            (op, _) => bail!("{op:?} of {} inputs", inputs.len()),
        }
    }

    fn batch_norm(&self, params: &Params, x: &Tensor, train: bool) -> Result<Tensor> {
        let (weight, bias) = (params.tracked(&self.param("weight"))?, params.tracked(&self.param("bias"))?);
        if !train || params.has_frozen_statistics(&self.path) {
            let read = |name| params.tracked(&self.param(name))?.to_dtype(DType::F64)?.to_vec1();
            let running = Stats { mean: read("running_mean")?, var: read("running_var")? };
            return batch_norm(x, &weight, &bias, &running, StatsOrigin::Running, EPS);
        }
        let stats = batch_stats(x)?;
        self.track(params, &stats, x.elem_count() / stats.mean.len())?;
        batch_norm(x, &weight, &bias, &stats, StatsOrigin::Batch, EPS)
    }

    /// Updates the running statistics with those of a batch of `count` values per channel, as PyTorch does.
    fn track(&self, params: &Params, stats: &Stats, count: usize) -> Result<()> {
        let var = stats.unbiased_var(count)?;
        for (name, new) in [("running_mean", &stats.mean), ("running_var", &var)] {
            let running = params.buffer(&self.param(name))?;
            let new = Tensor::new(new.as_slice(), running.device())?.to_dtype(running.dtype())?;
            let kept = (running.as_detached_tensor() * (1.0 - MOMENTUM))?;
            running.set(&(kept + (new * MOMENTUM)?)?)?;
        }
        let num_batches = params.buffer(&self.param("num_batches_tracked"))?;
        num_batches.set(&(num_batches.as_detached_tensor() + 1.0)?)
    }
}

/// Max pooling, with gradients: of equal values in a window the first is the largest, and a NaN is larger than all.
fn max_pool(x: &Tensor, window: Window) -> Result<Tensor> {
    let [n, h, w, c] = x.dims4()?.into();
    let [_, ho, wo, _] = window.output_shape([n, h, w, c])?;
    let Window { size, stride, padding } = window;
    // Each pixel of all windows by itself: (N, H', W', C, pixel of the window).
    let lowest = |dims: [usize; 4]| Tensor::full(f64::NEG_INFINITY, &dims, x.device())?.to_dtype(x.dtype());
    let mut x = x.clone();
    if padding > 0 {
        let rows = lowest([n, padding, w, c])?;
        x = Tensor::cat(&[&rows, &x, &rows], 1)?;
        let columns = lowest([n, h + 2 * padding, padding, c])?;
        x = Tensor::cat(&[&columns, &x, &columns], 2)?;
    }
    let places = |first: usize, num: usize| {
        let places: Vec<u32> = (0..num).map(|i| (first + i * stride) as u32).collect();
        Tensor::new(places, x.device())
    };
    let mut pixels = Vec::with_capacity(size * size);
    for (row, column) in (0..size).flat_map(|row| (0..size).map(move |column| (row, column))) {
        pixels.push(x.index_select(&places(row, ho)?, 1)?.index_select(&places(column, wo)?, 2)?);
    }
    let pixels = Tensor::stack(&pixels, 4)?;
    // NaN is not equal to itself.
    let infinite = Tensor::full(f64::INFINITY, pixels.shape(), pixels.device())?.to_dtype(pixels.dtype())?;
    let ranks = pixels.eq(&pixels)?.where_cond(&pixels, &infinite)?.detach();
    pixels.gather(&ranks.argmax_keepdim(4)?, 4)?.squeeze(4)
}

/// Nearest upsampling by a whole factor, with gradients.
fn upsample(x: &Tensor, factor: usize) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let wide = x.reshape((n, h, 1, w, 1, c))?.broadcast_as((n, h, factor, w, factor, c))?;
    wide.reshape((n, h * factor, w * factor, c))
}

/// Permutes images `(N, C, H, W)` to `(N, H, W, C)`.
fn channels_last(images: &Tensor) -> Result<Tensor> {
    match images.rank() {
        4 => images.permute((0, 2, 3, 1))?.contiguous(),
        _ => bail!("expected images (N, C, H, W), found {:?}", images.shape()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::channels::{Constants, Seen};
    use crate::ops::pool::{max_pool, max_pool_backward, upsample, upsample_backward};
    use crate::testing::fill;

    fn values(name: &str, len: usize) -> Result<Vec<f32>> {
        fill(name, &[len], -1.0, 1.0)?.to_dtype(DType::F32)?.to_vec1()
    }

    fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{what}: {i}: {found}, {expected}");
        }
    }

    /// The result of an operation of candle's module, and its input's gradient for `gy`, channels last.
    fn reference(op: Op, x: &[f32], shape: [usize; 4], gy: &[f32]) -> Result<[Vec<f32>; 2]> {
        let [n, h, w, c] = shape;
        let mut graph = Graph::new();
        graph.push(op, "", &[Graph::INPUT]);
        let images = Tensor::from_slice(x, (n, h, w, c), &Device::Cpu)?.permute((0, 3, 1, 2))?;
        let images = Var::from_tensor(&images.contiguous()?)?;
        let y = graph.forward_t(&Params::new(DType::F32, &Device::Cpu, 0), &images, true)?;
        let gradients = (&y * Tensor::from_slice(gy, y.shape(), &Device::Cpu)?)?.sum_all()?.backward()?;
        let gx = gradients.get(&images).expect("the input has a gradient").permute((0, 2, 3, 1))?;
        Ok([y.flatten_all()?.to_vec1()?, gx.flatten_all()?.to_vec1()?])
    }

    /// Shapes and windows: one pixel, overlapping and separate windows, pixels that no window reads, channels that fill
    /// no vector, some and several.
    const CASES: [([usize; 4], [usize; 3]); 6] = [
        ([1, 1, 1, 1], [1, 1, 0]),
        ([2, 4, 6, 3], [2, 2, 0]),
        ([2, 7, 5, 19], [3, 2, 1]),
        ([3, 5, 5, 40], [3, 1, 1]),
        ([1, 8, 9, 70], [2, 3, 1]),
        ([2, 6, 6, 8], [6, 6, 0]),
    ];

    #[test]
    fn max_pooling_and_its_gradient_are_those_of_candles_module() -> Result<()> {
        for (shape, [size, stride, padding]) in CASES {
            let (window, len) = (Window { size, stride, padding }, shape.iter().product());
            // Few different values: many windows have several largest ones.
            let x: Vec<f32> = values("x", len)?.into_iter().map(|x| (4.0 * x).round()).collect();
            let num_results = window.output_shape(shape)?.iter().product();
            let (gy, other) = (values("gy", num_results)?, values("other", len)?);
            let [expected, gradient] = reference(Op::MaxPool(window), &x, shape, &gy)?;
            let seen = Seen { x: &x, constants: None };
            let (mut y, mut gx) = (vec![f32::NAN; num_results], vec![f32::NAN; len]);
            max_pool(seen, window, shape, &mut y)?;
            assert_eq!(y, expected, "{shape:?} by {window:?}");
            max_pool_backward(seen, window, shape, &gy, None, &mut gx)?;
            assert_near("gradient", &gx, &gradient);
            let mut sum = vec![f32::NAN; len];
            max_pool_backward(seen, window, shape, &gy, Some(&other), &mut sum)?;
            assert_near("sum", &sum, &gx.iter().zip(&other).map(|(gx, other)| gx + other).collect::<Vec<_>>());
        }
        Ok(())
    }

    #[test]
    fn values_are_compared_after_their_norm() -> Result<()> {
        for ([n, h, w, c], [size, stride, padding]) in CASES {
            let (shape, window) = ([n, h, w, c], Window { size, stride, padding });
            let x = values("x", n * h * w * c)?;
            let gy = values("gy", window.output_shape(shape)?.iter().product())?;
            let constants = Constants { scale: values("scale", c)?, shift: values("shift", c)?, slope: None };
            let seen = Seen { x: &x, constants: Some(&constants) };
            let normed: Vec<f32> =
                x.iter().enumerate().map(|(i, x)| x * constants.scale[i % c] + constants.shift[i % c]).collect();
            let [expected, gradient] = reference(Op::MaxPool(window), &normed, shape, &gy)?;
            let (mut y, mut gx) = (vec![f32::NAN; gy.len()], vec![f32::NAN; x.len()]);
            max_pool(seen, window, shape, &mut y)?;
            max_pool_backward(seen, window, shape, &gy, None, &mut gx)?;
            assert_near("pooling", &y, &expected);
            assert_near("gradient", &gx, &gradient);
            let mut wide = vec![f32::NAN; 4 * x.len()];
            upsample(seen, 2, shape, &mut wide);
            let [expected, _] = reference(Op::Upsample { factor: 2 }, &normed, shape, &values("gy", wide.len())?)?;
            assert_near("upsampling", &wide, &expected);
        }
        Ok(())
    }

    #[test]
    fn upsampling_and_its_gradient_are_those_of_candles_module() -> Result<()> {
        for (shape, factor) in [([1, 1, 1, 1], 1), ([2, 3, 5, 7], 2), ([2, 4, 3, 40], 3)] {
            let len = shape.iter().product();
            let (x, gy, other) = (values("x", len)?, values("gy", len * factor * factor)?, values("other", len)?);
            let [expected, gradient] = reference(Op::Upsample { factor }, &x, shape, &gy)?;
            let (mut y, mut gx) = (vec![f32::NAN; gy.len()], vec![f32::NAN; len]);
            upsample(Seen { x: &x, constants: None }, factor, shape, &mut y);
            assert_eq!(y, expected, "{shape:?} by {factor}");
            upsample_backward(&gy, factor, shape, None, &mut gx);
            assert_near("gradient", &gx, &gradient);
            let mut sum = vec![f32::NAN; len];
            upsample_backward(&gy, factor, shape, Some(&other), &mut sum);
            assert_near("sum", &sum, &gx.iter().zip(&other).map(|(gx, other)| gx + other).collect::<Vec<_>>());
        }
        Ok(())
    }

    #[test]
    fn a_nan_stays_nan_in_max_pooling() -> Result<()> {
        let window = Window { size: 2, stride: 2, padding: 0 };
        let mut x = vec![f32::NEG_INFINITY; 16];
        x[5] = f32::NAN;
        let [y, _] = reference(Op::MaxPool(window), &x, [1, 2, 4, 2], &[1.0; 4])?;
        assert_eq!(y.iter().map(|y| y.is_nan()).collect::<Vec<_>>(), [false, false, false, true]);
        Ok(())
    }
}
