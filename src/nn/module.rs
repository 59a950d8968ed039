//! Networks as ordinary candle modules: each operation of a graph by itself, in f32 or f64, with candle's automatic
//! differentiation. The engine is tested against it. On other devices than the CPU, convolutions, norms and PReLU are
//! candle's own operations, which the tests run on the CPU.

use candle_core::{DType, Result, Tensor, bail};

use super::graph::{Graph, Node, Op};
use super::params::Params;
use crate::ops::batch_norm::{EPS, MOMENTUM, Stats, StatsOrigin, batch_norm, batch_stats};
use crate::ops::conv::conv2d;
use crate::ops::prelu::prelu;

impl Graph {
    /// Returns the output of the network with these parameters: of a face network, the embeddings `(N, size)` of images
    /// `(N, 3, H, W)` of the parameters' dtype and device. Training uses dropout and the statistics of the batch, which
    /// update the running ones unless those are frozen ([`Params::freeze_statistics`]).
    ///
    /// # Errors
    /// When the images or a parameter do not fit, or in training a norm gets only one value per channel.
    pub fn forward_t(&self, params: &Params, images: &Tensor, train: bool) -> Result<Tensor> {
        let mut last_uses = vec![0; self.nodes().len()];
        for (i, node) in self.nodes().iter().enumerate() {
            node.inputs.iter().for_each(|input| last_uses[*input] = i);
        }
        let mut values: Vec<Option<Tensor>> = Vec::with_capacity(self.nodes().len());
        for (i, node) in self.nodes().iter().enumerate() {
            let inputs: Vec<Tensor> = node.inputs.iter().filter_map(|input| values[*input].clone()).collect();
            node.inputs.iter().filter(|input| last_uses[**input] == i).for_each(|input| values[*input] = None);
            values.push(Some(match node.op {
                Op::Input => channels_last(images)?,
                _ => node.forward_t(params, &inputs, train)?,
            }));
        }
        values.pop().flatten().ok_or_else(|| candle_core::Error::msg("a graph without nodes"))
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

/// Permutes images `(N, C, H, W)` to `(N, H, W, C)`.
fn channels_last(images: &Tensor) -> Result<Tensor> {
    match images.rank() {
        4 => images.permute((0, 2, 3, 1))?.contiguous(),
        _ => bail!("expected images (N, C, H, W), found {:?}", images.shape()),
    }
}
