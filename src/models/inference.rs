//! Networks in inference.

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::mask_head::{Profile, features_of, num_rows, profile};
use super::{Foreign, MaskHead, Model, ModelConfig};
use crate::machine::{Machine, Work};
use crate::nn::{Graph, engine};
use crate::ops::backend::{Kernels, Scaling};
use crate::ops::conv::ConvolutionPass;
use crate::preprocessing::{Channels, Pixels, Preprocessing};

/// A network prepared for inference with its current weights.
#[derive(Debug)]
pub struct Inference(Box<dyn Embeds>);

/// A network prepared for inference on any device.
trait Embeds: Debug + Send + Sync {
    fn run(&self, images: &Tensor) -> Result<Tensor>;
    fn run_pixels(&self, images: &Pixels) -> crate::Result<Tensor>;
    fn run_profiles(&self, images: &Pixels) -> crate::Result<(Tensor, Vec<Profile>)>;
    fn convolutions(&self, n: usize) -> Result<Vec<ConvolutionPass>>;
}

/// A network prepared for inference on a device.
#[derive(Debug)]
pub(crate) struct Embedder<B: Kernels> {
    backend: B,
    network: Network<B>,
    config: ModelConfig,
    preprocessing: Preprocessing,
}

/// What computes the embeddings.
#[derive(Debug)]
enum Network<B: Kernels> {
    Engine(Box<engine::InferenceNetwork<B>>),
    /// On the CPU, whatever the device is.
    Foreign(Arc<Foreign>),
}

/// A model whose weights inference shares or takes.
#[derive(Debug)]
enum Weights<'a> {
    Shared(&'a Model),
    Owned(Box<Model>),
}

impl Weights<'_> {
    fn model(&self) -> &Model {
        match self {
            Self::Shared(model) => model,
            Self::Owned(model) => model,
        }
    }
}

impl<B: Kernels> Embedder<B> {
    /// Prepares a network for batches of about `batch_size` images.
    ///
    /// # Errors
    /// When the device has no kernels for the network, or runs out of memory.
    pub fn new(backend: &B, model: &Model, batch_size: usize) -> Result<Self> {
        Self::of(backend, Weights::Shared(model), batch_size, false)
    }

    fn of(backend: &B, weights: Weights, batch_size: usize, with_profiles: bool) -> Result<Self> {
        let model = weights.model();
        let (config, preprocessing) = (model.config().clone(), model.preprocessing().clone());
        if let Some(network) = &model.foreign {
            let network = Network::Foreign(network.clone());
            return Ok(Self { backend: backend.clone(), network, config, preprocessing });
        }
        let images = [batch_size, config.input_size, config.input_size];
        let lowered = match with_profiles {
            true => engine::Lowered::of(&with_features(model.graph())?, model.params(), images, backend)?,
            false => engine::Lowered::of(model.graph(), model.params(), images, backend)?,
        };
        let (parts, quantised) = (model.params().parts(), model.quantised.clone());
        // The weights are freed one by one, unless others share them.
        drop(weights);
        let layers = quantised.as_ref().map(|quantised| &quantised.layers);
        let network = Network::Engine(Box::new(engine::InferenceNetwork::new(lowered, parts, layers, backend)?));
        Ok(Self { backend: backend.clone(), network, config, preprocessing })
    }

    /// Returns the embeddings `(N, embedding_size)`, not normalised, of 8-bit images.
    ///
    /// # Errors
    /// When the images have another size.
    pub fn embed(&self, images: &Pixels) -> crate::Result<B::Array> {
        match &self.network {
            Network::Engine(network) => {
                let (images, n) = device_pixels(&self.backend, images, &self.config, &self.preprocessing)?;
                Ok(network.run(&images, n)?)
            }
            Network::Foreign(network) => {
                let images = images.to_tensor(&self.preprocessing, &Device::Cpu)?;
                checked(&images, self.config.input_size)?;
                Ok(self.backend.upload(network.run(&images)?.flatten_all()?.to_vec1()?)?)
            }
        }
    }

    fn read(&self, embeddings: &B::Array) -> Result<Tensor> {
        let values: Cow<[f32]> = self.backend.read(embeddings)?;
        Tensor::from_vec(values.into_owned(), ((), self.config.embedding_size), &Device::Cpu)
    }
}

/// Returns a network's graph with the features of mask heads as a second output.
fn with_features(graph: &Graph) -> Result<Graph> {
    let Some(features) = features_of(graph) else {
        bail!("the network has no last stage whose features could be read")
    };
    let mut graph = graph.clone();
    let embedding = graph.outputs()[0];
    graph.set_outputs([embedding, features]);
    Ok(graph)
}

/// Returns the number of preprocessed images, after a check of their shape.
pub(super) fn checked(images: &Tensor, side: usize) -> Result<usize> {
    match images.dims() {
        &[n, 3, h, w] if h == side && w == side && n > 0 => Ok(n),
        dims => bail!("expected images (N, 3, {side}, {side}), found {dims:?}"),
    }
}

/// Returns preprocessed images as a device reads them, and their number.
pub(super) fn device_images<B: Kernels>(backend: &B, images: &Tensor, side: usize) -> Result<(B::Images, usize)> {
    let n = checked(images, side)?;
    Ok((backend.images(images)?, n))
}

/// Returns 8-bit images as a device reads them, and their number; the device preprocesses them where it can.
pub(super) fn device_pixels<B: Kernels>(
    backend: &B,
    images: &Pixels,
    config: &ModelConfig,
    preprocessing: &Preprocessing,
) -> crate::Result<(B::Images, usize)> {
    let side = config.input_size;
    match backend.pixels(&images.values, side, preprocessing.scaling())? {
        Some(found) => Ok((found, images.values.len() / (3 * side * side))),
        None => Ok(device_images(backend, &images.to_tensor(preprocessing, &Device::Cpu)?, side)?),
    }
}

impl<B: Kernels> Embeds for Embedder<B> {
    fn run(&self, images: &Tensor) -> Result<Tensor> {
        B::enter(|| match &self.network {
            Network::Engine(network) => {
                let (images, n) = device_images(&self.backend, images, self.config.input_size)?;
                self.read(&network.run(&images, n)?)
            }
            Network::Foreign(network) => {
                checked(images, self.config.input_size)?;
                network.run(images)
            }
        })
    }

    fn run_pixels(&self, images: &Pixels) -> crate::Result<Tensor> {
        B::enter(|| Ok(self.read(&self.embed(images)?)?))
    }

    fn run_profiles(&self, images: &Pixels) -> crate::Result<(Tensor, Vec<Profile>)> {
        let Network::Engine(network) = &self.network else {
            return Err(candle_core::Error::msg("a network of another architecture shows no features").into());
        };
        B::enter(|| {
            let (images, n) = device_pixels(&self.backend, images, &self.config, &self.preprocessing)?;
            let outputs = network.run_all(&images, n)?;
            let [embeddings, features] = &outputs[..] else {
                return Err(candle_core::Error::msg("the network was prepared without features").into());
            };
            let ([_, h, w, c], channels) = (network.output_shapes()[1], network.output_channels()[1]);
            let values: Cow<[f32]> = self.backend.read(features)?;
            let of_image = |features| profile(features, [h, w, c], channels);
            let profiles = values.chunks_exact(h * w * c).map(of_image).collect();
            Ok((self.read(embeddings)?, profiles))
        })
    }

    fn convolutions(&self, n: usize) -> Result<Vec<ConvolutionPass>> {
        match &self.network {
            Network::Engine(network) => self.backend.convolutions(&network.convs(n)),
            Network::Foreign(_) => Ok(Vec::new()),
        }
    }
}

impl Inference {
    /// Returns the embeddings `(N, embedding_size)`, not normalised, of images `(N, 3, S, S)`, preprocessed as
    /// [`Model::preprocessing`] says.
    ///
    /// # Errors
    /// When the images have another size or type.
    pub fn run(&self, images: &Tensor) -> Result<Tensor> {
        self.0.run(images)
    }

    /// Returns the embeddings `(N, embedding_size)`, not normalised, of 8-bit images of the network's input size; a GPU
    /// preprocesses them itself.
    ///
    /// # Errors
    /// When the images have another size.
    pub fn run_pixels(&self, images: &Pixels) -> crate::Result<Tensor> {
        self.0.run_pixels(images)
    }
}

/// A network prepared for inference that also says whether masks are worn.
#[derive(Debug)]
pub struct MaskInference {
    network: Inference,
    head: MaskHead,
}

impl MaskInference {
    /// Returns the embeddings `(N, embedding_size)`, not normalised, of 8-bit images of the network's input size, and
    /// the score of each image: 0 to 1, from 0.5 on a mask is worn.
    ///
    /// # Errors
    /// When the images have another size.
    pub fn run_pixels(&self, images: &Pixels) -> crate::Result<(Tensor, Vec<f32>)> {
        let (embeddings, profiles) = self.network.0.run_profiles(images)?;
        Ok((embeddings, profiles.iter().map(|profile| self.head.score(profile)).collect()))
    }
}

/// Prepares a network for inference: for batches of a size, with or without profiles.
struct Prepare<'a>(Weights<'a>, usize, bool);

impl Work for Prepare<'_> {
    type Output = Result<Inference>;

    fn on<B: Kernels>(self, backend: &B) -> Self::Output {
        Ok(Inference(Box::new(Embedder::of(backend, self.0, self.1, self.2)?)))
    }
}

/// Says why a device cannot run a network, if it cannot.
struct Refusal<'a>(&'a Model);

impl Work for Refusal<'_> {
    type Output = Option<String>;

    fn on<B: Kernels>(self, backend: &B) -> Option<String> {
        let (model, side) = (self.0, self.0.config().input_size);
        model.known().ok()?;
        let lowered = engine::Lowered::of(model.graph(), model.params(), [1, side, side], backend);
        lowered.err().map(|error| match error {
            // Its text is the message and the stack.
            candle_core::Error::WithBacktrace { inner, .. } => inner.to_string(),
            other => other.to_string(),
        })
    }
}

impl Model {
    /// Returns the network for inference, prepared for batches of about `batch_size` images; other sizes work, but may
    /// be slower.
    ///
    /// # Errors
    /// When the parameters are not f32 on the CPU (such networks run by
    /// [`forward_t`](candle_core::ModuleT::forward_t)), or the model's GPU runs out of memory or does not support the
    /// network.
    pub fn inference(&self, batch_size: usize) -> Result<Inference> {
        self.machine().run(Prepare(Weights::Shared(self), batch_size, false))
    }

    /// Like [`Self::inference`], but drops the weights as they are packed: less memory at the peak and afterwards.
    ///
    /// # Errors
    /// Same as [`Self::inference`].
    pub fn into_inference(self, batch_size: usize) -> Result<Inference> {
        let machine = self.machine().clone();
        machine.run(Prepare(Weights::Owned(Box::new(self)), batch_size, false))
    }

    /// Returns the network with its mask head for inference, as [`Self::inference`] does; none if it has no head.
    ///
    /// # Errors
    /// Same as [`Self::inference`].
    pub fn mask_inference(&self, batch_size: usize) -> Result<Option<MaskInference>> {
        let Some(head) = self.mask_head().cloned() else { return Ok(None) };
        let network = self.machine().run(Prepare(Weights::Shared(self), batch_size, true))?;
        Ok(Some(MaskInference { network, head }))
    }

    /// Fits a mask head to the network, on images without a mask and with one, which `batch` returns: of `num` batches
    /// each, `batch(i, is_masked)`.
    ///
    /// # Errors
    /// When the network shows no features, an image cannot be read, or the features do not tell the two kinds apart.
    pub fn fit_mask_head(
        &self,
        num: usize,
        fitted_on: &str,
        mut batch: impl FnMut(usize, bool) -> crate::Result<Pixels>,
    ) -> crate::Result<MaskHead> {
        self.known()?;
        let mut profiles = [Vec::new(), Vec::new()];
        let mut network = None;
        for i in 0..num {
            for (is_masked, profiles) in [false, true].into_iter().zip(&mut profiles) {
                let images = batch(i, is_masked)?;
                if network.is_none() {
                    network = Some(self.machine().run(Prepare(Weights::Shared(self), images.num_images, true))?);
                }
                let network = network.as_ref().expect("it was prepared for the first batch");
                profiles.extend(network.0.run_profiles(&images)?.1);
            }
        }
        let [without, with] = profiles;
        let fitted_with = self.computed_with()?;
        let head = MaskHead::validated([&without, &with], num_rows(self.config()), fitted_on, &fitted_with)?;
        head.check(self)?;
        Ok(head)
    }

    /// Returns how each pass of each different convolution of `n` images runs on the model's GPU, after running it
    /// once; nothing for the CPU.
    ///
    /// # Errors
    /// When the GPU's engine does not support the network, or it runs out of memory.
    pub fn convolutions(&self, n: usize) -> Result<Vec<ConvolutionPass>> {
        match self.machine().gpu_bytes() {
            Some(_) => self.inference(n)?.0.convolutions(n),
            None => Ok(Vec::new()),
        }
    }

    /// Says why the network cannot run on `machine`, if it cannot: its engine does not support the network.
    pub fn refusal(&self, machine: &Machine) -> Option<String> {
        machine.run(Refusal(self))
    }
}

impl Preprocessing {
    /// Returns the conversion of 8-bit values for kernels.
    pub(crate) fn scaling(&self) -> Scaling {
        let (mean, std) = ((self.mean / 255.0) as f32, (self.std / 255.0) as f32);
        Scaling { mean, std, is_bgr: self.channels == Channels::Bgr }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::machine::Precision;
    use crate::models::load_model;

    /// Cosines between the rows of two batches of embeddings.
    fn cosines(a: &Tensor, b: &Tensor) -> Result<Vec<f32>> {
        let norm = |x: &Tensor| x.sqr()?.sum(1)?.sqrt();
        ((a * b)?.sum(1)? / (norm(a)? * norm(b)?)?)?.to_vec1()
    }

    /// Preprocessed images as the CPU's networks read them.
    fn to_tensor(rgb: &[u8], side: usize, preprocessing: &Preprocessing) -> Result<Tensor> {
        let n = rgb.len() / (3 * side * side);
        let table = preprocessing.table();
        let values: Vec<f32> = rgb.iter().map(|v| table[usize::from(*v)]).collect();
        let images = Tensor::from_vec(values, (n, side, side, 3), &Device::Cpu)?;
        let images = match preprocessing.channels {
            Channels::Rgb => images,
            Channels::Bgr => images.flip(&[3])?,
        };
        images.permute((0, 3, 1, 2))?.contiguous()
    }

    #[test]
    fn pixels_and_tensors_give_the_embeddings_of_the_cpu() -> crate::Result<()> {
        let config =
            ModelConfig { arch: crate::models::Arch::R18, width: 0.25, input_size: 32, ..ModelConfig::default() };
        let rgb: Vec<u8> = (0..2 * 3 * 32 * 32).map(|i| (i * 31 % 251) as u8).collect();
        for channels in [Channels::Rgb, Channels::Bgr] {
            let preprocessing = Preprocessing { channels, mean: 120.0, std: 60.0, ..Preprocessing::default() };
            let model = Model::new(&config, &Device::Cpu, 3)?.with_preprocessing(preprocessing.clone());
            let images = to_tensor(&rgb, 32, &preprocessing)?;
            let expected = model.inference(2)?.run(&images)?;
            let model = model.on(&Machine::of_tests(Precision::F32));
            let network = model.inference(2)?;
            let pixels = |rgb: &[u8]| Pixels { values: rgb.to_vec(), num_images: rgb.len() / 3072, size: 32 };
            let by_pixels = network.run_pixels(&pixels(&rgb))?;
            for found in [by_pixels, network.run(&images)?] {
                assert!(cosines(&found, &expected)?.iter().all(|c| *c > 1.0 - 1e-6), "{channels:?}");
            }
            let error = network.run_pixels(&pixels(&rgb[1..])).unwrap_err().to_string();
            assert!(error.contains("expected images of 3072 bytes, found 6143 bytes"), "{error}");
            let error = network.run(&images.narrow(1, 0, 2)?).unwrap_err().to_string();
            assert!(error.contains("expected images (N, 3, 32, 32)"), "{error}");
        }
        Ok(())
    }

    #[test]
    #[ignore = "needs MASKINV_DATA"]
    fn needs_data_real_faces_have_the_embeddings_of_the_cpu() -> crate::Result<()> {
        let data = PathBuf::from(std::env::var_os("MASKINV_DATA").expect("MASKINV_DATA names the data folder"));
        let mut rgb = Vec::new();
        for name in ["AJ_Cook/AJ_Cook_0001.jpg", "AJ_Lamas/AJ_Lamas_0001.jpg", "Aaron_Guiel/Aaron_Guiel_0001.jpg"] {
            let image = image::open(data.join("lfw112/images").join(name)).expect("a crop of LFW");
            rgb.extend(image.into_rgb8().into_raw());
        }
        let model = load_model(&data.join("models/w600k_mbf.onnx"), None)?.model;
        let expected = model.inference(3)?.run(&to_tensor(&rgb, 112, model.preprocessing())?)?;
        let mut model = model;
        for (precision, least) in [(Precision::F32, 0.999_999), (Precision::F16, 0.9999), (Precision::Bf16, 0.999)] {
            model = model.on(&Machine::of_tests(precision));
            let pixels = Pixels { values: rgb.clone(), num_images: 3, size: 112 };
            let found = cosines(&model.inference(3)?.run_pixels(&pixels)?, &expected)?;
            println!("{precision}: cosines {found:?} to the CPU's");
            assert!(found.iter().all(|cosine| *cosine > least), "{precision}: {found:?}");
        }
        Ok(())
    }
}
