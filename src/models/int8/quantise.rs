//! Post-training quantisation: ranges of activations from images, weights per output channel, and a correction of what
//! that adds to the mean of each channel.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::ranges::{Histogram, Ranges};
use super::{Quantised, dequantised};
use crate::models::Model;
use crate::models::inference::device_pixels;
use crate::nn::engine::{InferenceNetwork, Lowered};
use crate::nn::{Graph, Node, NodeId, Op, QuantisedConv};
use crate::ops::backend::Backend;
use crate::ops::conv::int8::{Affine, Int8Conv, Int8Weight};
use crate::ops::conv::{ConvConfig, conv2d};
use crate::ops::cpu::Cpu;
use crate::parallel;
use crate::preprocessing::Pixels;

/// Fewest channels that a quantised convolution reads: the images' convolution stays in f32.
const LEAST_CHANNELS: usize = 8;

/// Settings of quantisation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantiseConfig {
    /// How ranges of activations are chosen.
    pub ranges: Ranges,
    /// Layers or stages that stay in f32, such as `layer1`; the images' convolution, what follows a mean over all
    /// pixels, and the fully connected layer stay in any case.
    pub keep: Vec<String>,
    /// Description of the images, for people.
    pub calibrated_on: String,
}

/// The network in f32, which shows what its convolutions read.
struct Observer<'a> {
    model: &'a Model,
    graph: Graph,
    /// Prepared for the first batch.
    network: Option<InferenceNetwork<Cpu>>,
}

impl<'a> Observer<'a> {
    fn new(model: &'a Model, graph: &Graph, observed: &[NodeId]) -> Self {
        let mut graph = graph.clone();
        graph.set_outputs(observed);
        Self { model, graph, network: None }
    }

    /// Returns the observed values of these images, each `(n, h, w, c)`.
    fn see(&mut self, images: &Pixels) -> crate::Result<Vec<Vec<f32>>> {
        let Self { model, graph, network } = self;
        let network = match network {
            Some(network) => network,
            None => {
                let shape = [images.num_images, images.size, images.size];
                let lowered = Lowered::of(graph, model.params(), shape, &Cpu)?;
                network.insert(InferenceNetwork::new(lowered, model.params().parts(), None, &Cpu)?)
            }
        };
        let (images, n) = device_pixels(&Cpu, images, model.config(), model.preprocessing())?;
        Ok(Cpu::enter(|| network.run_all(&images, n))?)
    }

    /// Shapes `(1, h, w, c)` of what was observed.
    fn shapes(&self) -> Vec<[usize; 4]> {
        self.network.as_ref().map(InferenceNetwork::output_shapes).unwrap_or_default()
    }
}

/// A convolution that will be quantised.
struct Candidate {
    path: String,
    config: ConvConfig,
    weight: Tensor,
    /// Its input among the observed values.
    input: usize,
    /// Path of the batch norm that alone reads its result, if there is one.
    norm: Option<String>,
}

impl Model {
    /// Returns the network with its convolutions quantised to 8-bit integers, which the CPU computes with; another
    /// device computes with the numbers they stand for. `batch(i)` returns batch `i` of `num` of the images that the
    /// ranges of activations are taken from, and is called twice for each.
    ///
    /// Thresholds and mask head are dropped: they were measured in f32.
    ///
    /// # Errors
    /// When the network is of another architecture or quantised already, nothing in it can be quantised, a name to keep
    /// is unknown, an image cannot be read, or a weight or an activation is not finite.
    pub fn quantise(
        &self,
        num: usize,
        config: &QuantiseConfig,
        mut batch: impl FnMut(usize) -> crate::Result<Pixels>,
    ) -> crate::Result<Self> {
        self.known()?;
        if self.quantised().is_some() {
            return Err(wrong("the network is quantised already: quantise the one that it was made of"));
        }
        if num == 0 {
            return Err(wrong("expected images, found none"));
        }
        let graph = self.graph().in_evaluation();
        let (candidates, inputs) = self.candidates(&graph, &config.keep)?;
        let mut observer = Observer::new(self, &graph, &inputs);
        let mut histograms: Vec<Histogram> = inputs.iter().map(|_| Histogram::new()).collect();
        for i in 0..num {
            let values = observer.see(&batch(i)?)?;
            histograms.par_iter_mut().zip(&values).try_for_each(|(histogram, values)| histogram.add(values))?;
        }
        let ranges = parallel::try_map(histograms.len(), |k| histograms[k].range(config.ranges))?;
        let mut means: Vec<Means> = ranges.iter().map(|range| Means::new(*range)).collect();
        for i in 0..num {
            let images = batch(i)?;
            let values = observer.see(&images)?;
            means.par_iter_mut().zip(&values).for_each(|(means, values)| means.add(values, images.num_images));
        }
        let shapes = observer.shapes();
        let layers = parallel::try_map(candidates.len(), |i| candidates[i].quantised(&ranges))?;
        let shifts = parallel::try_map(candidates.len(), |i| {
            let Candidate { input, .. } = candidates[i];
            candidates[i].shift(&layers[i], &means[input], shapes[input])
        })?;
        let mut state = self.params().state()?;
        for (candidate, shift) in candidates.iter().zip(shifts) {
            let Some(norm) = &candidate.norm else { continue };
            let name = format!("{norm}.running_mean");
            let mean = (&state[&name] + shift)?;
            state.insert(name, mean);
        }
        let paths = candidates.into_iter().map(|candidate| candidate.path);
        let quantised = Quantised { layers: paths.zip(layers).collect(), calibrated_on: config.calibrated_on.clone() };
        quantised.model(self.config(), state).map(|model| model.with_preprocessing(self.preprocessing().clone()))
    }

    /// Returns the convolutions to quantise, and the nodes that they read.
    fn candidates(&self, graph: &Graph, keep: &[String]) -> crate::Result<(Vec<Candidate>, Vec<NodeId>)> {
        let nodes = graph.nodes();
        let is_under = |path: &str, prefix: &str| {
            path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        if let Some(unknown) = keep.iter().find(|prefix| !nodes.iter().any(|node| is_under(&node.path, prefix))) {
            return Err(wrong(format!("no layer is under {unknown:?}")));
        }
        let (mut candidates, mut inputs) = (Vec::new(), Vec::new());
        for (id, node) in nodes.iter().enumerate() {
            let Op::Conv2d(config) = node.op else { continue };
            let name = node.param("weight");
            let Some(weight) = self.params().get(&name) else {
                return Err(wrong(format!("no parameter {name}")));
            };
            let shape: [usize; 4] = weight.dims4()?.into();
            let is_kept = keep.iter().any(|prefix| is_under(&node.path, prefix))
                || shape[1] * config.groups < LEAST_CHANNELS
                || follows_mean(graph, id)
                || !Int8Conv::fits(shape, config);
            if is_kept {
                continue;
            }
            let input = inputs.iter().position(|input| *input == node.inputs[0]).unwrap_or_else(|| {
                inputs.push(node.inputs[0]);
                inputs.len() - 1
            });
            let readers: Vec<&Node> = nodes.iter().filter(|node| node.inputs.contains(&id)).collect();
            let norm = match readers[..] {
                [reader] if reader.op == Op::BatchNorm => Some(reader.path.clone()),
                _ => None,
            };
            candidates.push(Candidate { path: node.path.clone(), config, weight, input, norm });
        }
        if candidates.is_empty() {
            return Err(wrong("the network has no convolution to quantise"));
        }
        Ok((candidates, inputs))
    }
}

fn wrong(what: impl Into<String>) -> crate::Error {
    crate::Error::Config(format!("quantisation: {}", what.into()))
}

/// Whether a node reads, perhaps through others, a mean over all pixels and nothing larger.
fn follows_mean(graph: &Graph, id: NodeId) -> bool {
    let node = &graph.nodes()[id];
    node.op == Op::GlobalAveragePool || (node.inputs.len() == 1 && follows_mean(graph, node.inputs[0]))
}

impl Candidate {
    fn quantised(&self, ranges: &[Affine]) -> Result<QuantisedConv> {
        let values = self.weight.flatten_all()?.to_vec1::<f32>()?;
        let weight = Int8Weight::quantise(&values, self.weight.dims4()?.into());
        let weight = weight.map_err(|error| error.context(self.path.clone()))?;
        Ok(QuantisedConv { weight, input: ranges[self.input] })
    }

    /// Returns what quantisation adds to the mean of each output channel (Nagel et al., ICCV 2019, section 4.2). The
    /// convolution is linear, so the mean of its results is the result of the mean of its inputs.
    fn shift(&self, layer: &QuantisedConv, means: &Means, [_, h, w, c]: [usize; 4]) -> Result<Tensor> {
        let result = |mean: Vec<f32>, weight: &Tensor| -> Result<Tensor> {
            let y = conv2d(&Tensor::from_vec(mean, (1, h, w, c), &Device::Cpu)?, weight, self.config)?;
            y.flatten_to(2)?.mean(0)
        };
        let weight = dequantised(&layer.weight)?;
        result(means.of(&means.quantised), &weight)? - result(means.of(&means.values), &self.weight)?
    }
}

/// Sums of maps over images: of the values, and of those that their bytes stand for.
struct Means {
    range: Affine,
    values: Vec<f64>,
    quantised: Vec<f64>,
    num: usize,
}

impl Means {
    fn new(range: Affine) -> Self {
        Self { range, values: Vec::new(), quantised: Vec::new(), num: 0 }
    }

    fn add(&mut self, values: &[f32], n: usize) {
        let len = values.len() / n;
        self.values.resize(len, 0.0);
        self.quantised.resize(len, 0.0);
        for image in values.chunks_exact(len) {
            for (i, value) in image.iter().enumerate() {
                self.values[i] += f64::from(*value);
                self.quantised[i] += f64::from(self.range.value(self.range.quantise(*value)));
            }
        }
        self.num += n;
    }

    fn of(&self, sums: &[f64]) -> Vec<f32> {
        sums.iter().map(|sum| (sum / self.num as f64) as f32).collect()
    }
}
