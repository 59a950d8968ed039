//! Networks for inference.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::fold::Folding;
use super::lowered::Lowered;
use super::network::{Network, PreparedWeights, Weights, Whole};
use super::program::{Norm, Step, View, ViewId};
use super::quantised::Quantised;
use super::tape::Tape;
use crate::nn::params::{Parts, param_name};
use crate::nn::{Quantisation, QuantisedConv};
use crate::ops::backend::{ConvShape, Int8Filter, Kernels, Order};
use crate::ops::batch_norm::{EPS, Stats};
use crate::ops::channels::{Constants, Normalised};
use crate::ops::slice::Values;

/// A network for inference, with the weights it had when it was prepared.
#[derive(Debug)]
pub(crate) struct InferenceNetwork<B: Kernels> {
    network: Network<B>,
    /// By view.
    norms: Vec<Option<B::Norm>>,
    weights: PreparedWeights<B>,
}

impl<B: Kernels> InferenceNetwork<B> {
    /// Returns a network for inference with these parameters, which are freed one by one if nothing else holds them.
    /// Other numbers of images than it was lowered for work, but may be slower. The weights of quantised convolutions
    /// are not those of `parts` where the device computes with 8-bit integers.
    ///
    /// # Errors
    /// When a parameter is missing, a quantised weight does not fit, or the device runs out of memory.
    pub fn new(lowered: Lowered, parts: Parts, quantisation: Option<&Quantisation>, backend: &B) -> Result<Self> {
        let quantised = Quantised::new(&lowered.program, quantisation.filter(|_| B::QUANTISES));
        let Lowered { program, shapes, channels, convs } = &lowered;
        let folding = if B::FOLDS { Folding::of(program) } else { Folding::none(program) };
        let mut tensors = Tensors(parts.all());
        let mut constants = Vec::new();
        for View { norm, .. } in &program.views {
            constants.push(norm.as_ref().map(|norm| tensors.constants(norm)).transpose()?);
        }
        let bytes = quantised.bytes(&folding);
        let tape = Tape::inference(program, shapes, &folding, |value| bytes[value].is_some());
        let (mut filters, mut full) = (BTreeMap::new(), BTreeMap::new());
        // Fully connected layers are copied, so they come first, before packed filters take memory.
        for (i, step) in program.steps.iter().enumerate() {
            let Step::Linear { x, path, has_bias, .. } = step else { continue };
            let value = program.views[*x].value;
            let [_, h, w, _] = shapes[value];
            let order = backend.linear_order(channels[value], h * w);
            let Whole(wide, len) = Whole::upload(backend, tensors.laid_out(path, "weight", &order)?)?;
            let weight = Whole(backend.short(&wide)?.unwrap_or(wide), len);
            let bias = has_bias.then(|| tensors.laid_out(path, "bias", &Order::Same)).transpose()?;
            full.insert(i, (weight, bias.map(|bias| Whole::upload(backend, bias)).transpose()?));
        }
        for (i, step) in program.steps.iter().enumerate() {
            let Step::Conv { x, path, .. } = step else { continue };
            let view = program.norm_of(i + 1).filter(|_| folding.norms[i + 1]);
            let norm = view.and_then(|view| constants[view].as_ref());
            let weight = tensors.take(path, "weight")?.contiguous()?;
            if let Some(QuantisedConv { weight, input }) = quantised.step(i) {
                let (reads_bytes, output) = (bytes[program.views[*x].value].is_some(), bytes[i + 1]);
                let filter = Int8Filter { weight, input: *input, reads_bytes, output };
                filters.insert(i, backend.int8_filter(&convs[&i], filter, norm)?);
                continue;
            }
            filters.insert(i, backend.filter(&convs[&i], &Values::of(path, &weight)?, norm)?);
        }
        let is_seen = |view: &ViewId| !folding.norms[program.views[*view].value];
        let norm = |view: ViewId| constants[view].as_ref().filter(|_| is_seen(&view));
        let memory_channels = |view: ViewId| shapes[program.views[view].value][3];
        let prepared = |view| norm(view).map(|norm| backend.constant_norm(norm, memory_channels(view))).transpose();
        let norms = (0..program.views.len()).map(prepared);
        let norms = norms.collect::<Result<_>>()?;
        let network = Network::new(lowered, tape, backend);
        Ok(Self { network, norms, weights: PreparedWeights { filters, full } })
    }

    /// Returns the output of a network in evaluation mode: of a face network, the embeddings `(n, embedding_size)`.
    ///
    /// # Errors
    /// When the images do not match the network.
    pub fn run(&self, images: &B::Images, n: usize) -> Result<B::Array> {
        Ok(self.run_all(images, n)?.swap_remove(0))
    }

    /// Returns all outputs.
    ///
    /// # Errors
    /// Same as [`Self::run`].
    pub fn run_all(&self, images: &B::Images, n: usize) -> Result<Vec<B::Array>> {
        let network = &self.network;
        let mut memory = network.start(images, n)?;
        for (i, forward) in network.tape.forward.iter().enumerate() {
            network.step(&mut memory, &self.norms, Weights::Prepared(&self.weights), forward, (n, None))?;
            network.backend.release(&mut memory, i + 1);
        }
        network.outputs(&mut memory, &self.norms)
    }

    /// Shapes `(1, h, w, c)` of the outputs of one image on the device.
    pub fn output_shapes(&self) -> Vec<[usize; 4]> {
        self.network.program.outputs.iter().map(|output| self.network.shape(*output, 1)).collect()
    }

    /// Channels of the outputs without those that the device adds.
    pub fn output_channels(&self) -> Vec<usize> {
        let Network { program, channels, .. } = &self.network;
        program.outputs.iter().map(|output| channels[program.views[*output].value]).collect()
    }

    /// The convolutions of `n` images.
    pub fn convs(&self, n: usize) -> Vec<ConvShape> {
        self.network.convs.keys().map(|i| self.network.conv(*i, n)).collect()
    }
}

/// Parameters and buffers by name.
struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    /// Removes and returns a tensor.
    fn take(&mut self, path: &str, name: &str) -> Result<Tensor> {
        let name = param_name(path, name);
        self.0.remove(&name).ok_or_else(|| candle_core::Error::msg(format!("no parameter {name}")))
    }

    fn laid_out(&mut self, path: &str, name: &str, order: &Order) -> Result<Vec<f32>> {
        let tensor = self.take(path, name)?.contiguous()?;
        let (values, mut to) = (Values::of(path, &tensor)?, Vec::with_capacity(tensor.elem_count()));
        order.laid_out(&values, &mut to);
        Ok(to)
    }

    /// Returns the map of a norm by its running statistics.
    fn constants(&mut self, Norm { bn, prelu }: &Norm) -> Result<Constants> {
        let mut read = |path: &str, name: &str| self.take(path, name)?.to_vec1::<f32>();
        let widened = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        let stats = Stats { mean: widened(read(bn, "running_mean")?), var: widened(read(bn, "running_var")?) };
        let (weight, bias) = (read(bn, "weight")?, read(bn, "bias")?);
        let slope = prelu.as_ref().map(|prelu| read(prelu, "weight")).transpose()?;
        let norm = Normalised::new(&stats, false, EPS, [&weight, &bias], slope.as_deref());
        Ok(norm.constants().clone())
    }
}

impl Parts {
    fn all(self) -> BTreeMap<String, Tensor> {
        self.trained.into_iter().chain(self.fixed).chain(self.buffers).collect()
    }
}
