//! A network on a GPU, from 8-bit images to embeddings.

use candle_core::{Device as Candle, Result, Tensor, bail};

use super::training::{Execute, Outline};
use super::{ConvolutionPass, Model};
use crate::gpu::GpuBackend;
use crate::gpu::conv::Conv;
use crate::gpu::images::{self, Normalisation};
use crate::gpu::{Array, Element, Pass, Planned, rows};
use crate::nn::engine::Activations;
use crate::nn::engine::gpu::{Network, Recording};
use crate::nn::{DeviceParams, Graph};
use crate::preprocessing::{Channels, Pixels};

/// A network prepared for a GPU, from 8-bit images on.
#[derive(Debug)]
pub(crate) struct GpuNetwork {
    network: Network,
    backend: GpuBackend,
    normalisation: Normalisation,
    outline: Outline,
}

/// A network whose weights were copied to a GPU.
#[derive(Debug)]
pub struct OnGpu {
    network: GpuNetwork,
    params: DeviceParams<GpuBackend>,
}

impl GpuNetwork {
    fn upload(
        model: &Model,
        backend: &GpuBackend,
        activations: Activations,
    ) -> Result<(Self, DeviceParams<GpuBackend>)> {
        let side = model.config().input_size;
        let Some((network, params)) = Network::upload(&Graph::of(model), model.params(), side, backend, activations)?
        else {
            bail!("{}", unsupported(model, backend.element));
        };
        let preprocessing = model.preprocessing();
        let normalisation = Normalisation {
            mean: (preprocessing.mean / 255.0) as f32,
            std: (preprocessing.std / 255.0) as f32,
            is_bgr: preprocessing.channels == Channels::Bgr,
        };
        Ok((Self { network, backend: backend.clone(), normalisation, outline: Outline::of(model) }, params))
    }

    /// Uploads RGB images `(N, S, S, 3)`, 8 bits, and normalises them for the network.
    fn images(&self, rgb: &[u8]) -> Result<Array> {
        let GpuBackend { device, element } = &self.backend;
        let of_image = 3 * self.outline.config().input_size.pow(2);
        if rgb.is_empty() || !rgb.len().is_multiple_of(of_image) {
            bail!("expected images of {} bytes, found {} bytes", of_image, rgb.len());
        }
        let y = device.array(*element, rgb.len() / 3 * element.per_access())?;
        images::normalise(&device.upload(rgb)?, self.normalisation, &y)?;
        Ok(y)
    }
}

impl Execute for GpuBackend {
    type Network = GpuNetwork;
    type Recording<'a> = Recording<'a>;
    type Teacher<'a> = OnGpu;

    fn prepare(&self, model: Model, activations: Activations) -> Result<(GpuNetwork, DeviceParams<Self>)> {
        if self.element == Element::F16 {
            bail!("f16's range is too small for gradients: train in bf16, tf32 or f32");
        }
        GpuNetwork::upload(&model, self, activations)
    }

    fn record<'a>(
        &self,
        network: &'a GpuNetwork,
        params: &mut DeviceParams<Self>,
        images: &Pixels,
    ) -> crate::Result<(Array, Recording<'a>)> {
        Ok(network.network.record(params, &network.images(&images.values)?, network.outline.dropout())?)
    }

    fn backward(&self, recording: Recording<'_>, params: &mut DeviceParams<Self>, gradient: &Array) -> Result<()> {
        recording.backward(params, gradient)
    }

    fn activation_bytes(_network: &GpuNetwork, _n: usize) -> Option<usize> {
        None
    }

    fn teacher(&self, model: &Model) -> Result<OnGpu> {
        OnGpu::upload(model)
    }

    fn embed(&self, teacher: &OnGpu, images: &Pixels) -> crate::Result<Array> {
        Ok(teacher.infer(&teacher.network.images(&images.values)?)?)
    }
}

impl OnGpu {
    /// Says why the engine does not support the network, if it does not.
    pub(crate) fn refusal(model: &Model, element: Element) -> Option<String> {
        let is_supported = Network::supports(&Graph::of(model), model.params(), model.config().input_size, element);
        (!is_supported).then(|| unsupported(model, element))
    }

    /// Copies the weights of a model to its GPU.
    ///
    /// # Errors
    /// When the engine does not support the network, or the GPU runs out of memory.
    pub(crate) fn upload(model: &Model) -> Result<Self> {
        let Some(gpu) = model.machine().gpu() else { bail!("the model runs on {}, not on a GPU", model.machine()) };
        let (network, params) = GpuNetwork::upload(model, &gpu.backend(), Activations::Kept)?;
        Ok(Self { network, params })
    }

    /// Returns the embeddings `(N, embedding_size)`, not normalised, of RGB images `(N, S, S, 3)`, 8 bits.
    ///
    /// # Errors
    /// When the images have another size.
    pub fn run_rgb(&self, rgb: &[u8]) -> Result<Tensor> {
        self.read(&self.infer(&self.network.images(rgb)?)?)
    }

    /// Returns the embeddings `(N, embedding_size)`, not normalised, of preprocessed images `(N, 3, S, S)`, f32.
    pub(super) fn run(&self, images: &Tensor) -> Result<Tensor> {
        let ((_, channels, h, w), side) = (images.dims4()?, self.network.outline.config().input_size);
        if (channels, h, w) != (3, side, side) {
            bail!("expected images (N, 3, {side}, {side}), found {:?}", images.shape());
        }
        let GpuBackend { device, element } = &self.network.backend;
        let last = images.permute((0, 2, 3, 1))?.pad_with_zeros(3, 0, element.per_access() - 3)?;
        let wide = device.upload(&last.flatten_all()?.to_vec1::<f32>()?)?;
        self.read(&self.infer(&rows::in_type(&wide, *element)?)?)
    }

    fn infer(&self, images: &Array) -> Result<Array> {
        self.network.network.infer(&self.params, images)
    }

    fn read(&self, embeddings: &Array) -> Result<Tensor> {
        Tensor::from_vec(embeddings.read::<f32>()?, ((), self.network.outline.config().embedding_size), &Candle::Cpu)
    }

    /// Returns how each pass of each different convolution of `n` images runs, after running it once.
    ///
    /// # Errors
    /// When the GPU runs out of memory.
    pub fn convolutions(&self, n: usize) -> Result<Vec<ConvolutionPass>> {
        let GpuBackend { device, element } = &self.network.backend;
        let convs = self.network.network.try_convolutions(n)?;
        let planned = device.gpu().planned();
        let of = |conv: &Conv, pass: Pass| {
            let fits = |plan: &&Planned| plan.conv == *conv && plan.pass == pass && plan.element == *element;
            let plan = planned.iter().find(fits);
            let own = if conv.group.is_some() { "own kernel" } else { "patches, product by cuBLAS" };
            ConvolutionPass {
                pass: pass.title(),
                convolution: conv.to_string(),
                algorithm: plan.and_then(|plan| plan.algorithm.clone()).unwrap_or_else(|| own.to_owned()),
                milliseconds: plan.and_then(|plan| plan.ms),
                workspace_bytes: plan.map_or(0, |plan| plan.workspace),
            }
        };
        let passes = [Pass::Forward, Pass::GradX, Pass::GradW];
        Ok(convs.iter().flat_map(|conv| passes.map(|pass| of(conv, pass))).collect())
    }
}

fn unsupported(model: &Model, element: Element) -> String {
    format!(
        "the GPU engine does not support {:?}: squeeze-excitation and channel counts that are not a multiple of {} need \
         --device cpu",
        model.config(),
        element.per_access()
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::machine::{Machine, Precision};
    use crate::models::{Inference, ModelConfig, load_model};
    use crate::preprocessing::Preprocessing;

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
        let images = Tensor::from_vec(values, (n, side, side, 3), &Candle::Cpu)?;
        let images = match preprocessing.channels {
            Channels::Rgb => images,
            Channels::Bgr => images.flip(&[3])?,
        };
        images.permute((0, 3, 1, 2))?.contiguous()
    }

    #[test]
    fn pixels_and_tensors_give_the_embeddings_of_the_cpu() -> Result<()> {
        let config =
            ModelConfig { arch: crate::models::Arch::R18, width: 0.25, input_size: 32, ..ModelConfig::default() };
        let rgb: Vec<u8> = (0..2 * 3 * 32 * 32).map(|i| (i * 31 % 251) as u8).collect();
        for channels in [Channels::Rgb, Channels::Bgr] {
            let preprocessing = Preprocessing { channels, mean: 120.0, std: 60.0, ..Preprocessing::default() };
            let model = Model::new(&config, &Candle::Cpu, 3)?.with_preprocessing(preprocessing.clone());
            let images = to_tensor(&rgb, 32, &preprocessing)?;
            let expected = model.inference(2)?.run(&images)?;
            let model = model.on(&Machine::of_tests(Precision::F32));
            let Inference::Gpu(network) = model.inference(2)? else { bail!("not on the GPU") };
            for found in [network.run_rgb(&rgb)?, network.run(&images)?] {
                assert!(cosines(&found, &expected)?.iter().all(|c| *c > 1.0 - 1e-6), "{channels:?}");
            }
            let error = network.run_rgb(&rgb[1..]).unwrap_err().to_string();
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
            let Inference::Gpu(network) = model.inference(3)? else { panic!("not on the GPU") };
            let found = cosines(&network.run_rgb(&rgb)?, &expected)?;
            println!("{precision}: cosines {found:?} to the CPU's");
            assert!(found.iter().all(|cosine| *cosine > least), "{precision}: {found:?}");
        }
        Ok(())
    }
}
