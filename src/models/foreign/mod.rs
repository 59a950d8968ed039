//! Networks in ONNX files that are none of ours: a general runtime computes what the file says.

#[cfg(not(feature = "any-onnx"))]
#[path = "absent.rs"]
mod runtime;
#[cfg(feature = "any-onnx")]
mod runtime;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, bail};
use sha2::{Digest, Sha256};

use super::{Arch, ModelConfig};
use crate::error::{Error, Result};
use crate::files::hex;
use crate::ops::slice::Values;
use crate::weights::OnnxFiles;
use runtime::Runtime;

/// Side of the input where a file leaves it open: the field's.
const USUAL_SIDE: usize = 112;
/// Most images that a network takes at once.
const MAX_BATCH: usize = 64;
/// Lengths of an embedding.
const LENGTHS: std::ops::RangeInclusive<usize> = 2..=4096;
/// Operators that repeat a part of a graph.
const LOOPS: [&str; 2] = ["Loop", "Scan"];
/// Largest difference of two embeddings of one image in a batch, relative to the largest element.
const SAME: f32 = 1e-3;

/// An output of a graph for one image: its name and its shape.
type Output = (String, Vec<usize>);

/// An array of f32, of any shape, row-major.
#[derive(Clone, Debug, PartialEq)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// A network that runs as its ONNX file says.
#[derive(Debug)]
pub(super) struct Foreign {
    runtime: Runtime,
    path: PathBuf,
    /// Hash of the graph, its weights and the name of the output.
    digest: String,
    /// Name of the output that is the embedding.
    output: String,
    embedding_size: usize,
    side: usize,
    /// Whether the input is `(N, S, S, 3)` instead of `(N, 3, S, S)`.
    has_channels_last: bool,
    /// Images that it takes at once, no more and no fewer; none for any number.
    fixed_batch: Option<usize>,
}

impl Foreign {
    /// Opens a network; `output` is the name of the embedding, which is needed where several outputs may be it. Returns
    /// notes about what the file leaves open.
    ///
    /// # Errors
    /// When the runtime cannot read or run the file, or its input is not a batch of square images in RGB.
    pub fn open(path: &Path, output: Option<&str>) -> Result<(Self, Vec<String>)> {
        let wrong = |what: String| Error::Checkpoint { path: path.to_owned(), what };
        let files = OnnxFiles::read(path)?;
        let digest = files.digest();
        // No network for faces repeats a part until a condition holds, which a forged one might do for ever.
        if let Some(operator) = LOOPS.iter().find(|operator| files.operators.contains(**operator)) {
            return Err(wrong(format!("{operator}: graphs that repeat a part are not run")));
        }
        let runtime = Runtime::open(files).map_err(wrong)?;
        let (has_channels_last, side, fixed_batch) = input(&runtime.input()).map_err(wrong)?;
        let mut notes = Vec::new();
        let found = side.unwrap_or_else(|| {
            notes.push(format!("the file leaves the size of its input open: {USUAL_SIDE} is assumed"));
            USUAL_SIDE
        });
        let mut network = Self {
            runtime,
            path: path.to_owned(),
            digest,
            output: String::new(),
            embedding_size: 0,
            side: found,
            has_channels_last,
            fixed_batch,
        };
        (network.output, network.embedding_size) = network.embedding(output).map_err(wrong)?;
        // Embeddings are of this output.
        network.digest = digest_of(&network.digest, &network.output);
        if fixed_batch.is_none() && !network.takes_batches().map_err(wrong)? {
            notes.push("the graph says that it takes any number of images, but is right for one at a time".to_owned());
            network.fixed_batch = Some(1);
        }
        Ok((network, notes))
    }

    /// The settings that say what goes in and comes out.
    pub fn config(&self) -> ModelConfig {
        ModelConfig {
            arch: Arch::Onnx,
            embedding_size: self.embedding_size,
            input_size: self.side,
            ..ModelConfig::default()
        }
    }

    /// Name of the output that is the embedding.
    pub fn output(&self) -> &str {
        &self.output
    }

    /// Hash of the graph, its weights and the name of the output.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Number of weights.
    pub fn num_parameters(&self) -> usize {
        self.runtime.num_parameters()
    }

    /// Writes a copy of the file with `metadata` in place of what it has under the same keys.
    ///
    /// # Errors
    /// When the file has changed since it was opened, or the copy cannot be written: [`OnnxFiles::write_copy`].
    pub fn write_copy(&self, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        let files = OnnxFiles::read(&self.path)?;
        if digest_of(&files.digest(), &self.output) != self.digest {
            let what = "expected the network that was opened, found another one: the file has changed".to_owned();
            return Err(Error::Checkpoint { path: self.path.clone(), what });
        }
        files.write_copy(path, metadata)
    }

    /// Returns the embeddings `(N, embedding_size)` of preprocessed images `(N, 3, S, S)`, f32.
    ///
    /// # Errors
    /// When the runtime cannot compute them.
    pub fn run(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let n = images.dim(0)?;
        let images = if self.has_channels_last { images.permute((0, 2, 3, 1))? } else { images.clone() };
        let images = images.to_dtype(DType::F32)?.flatten_all()?;
        let values = Values::of("images", &images)?;
        let one = 3 * self.side * self.side;
        let at_once = self.fixed_batch.unwrap_or(n.min(MAX_BATCH)).max(1);
        let mut embeddings = Vec::with_capacity(n * self.embedding_size);
        for part in values.chunks(at_once * one) {
            let wanted = part.len() / one;
            let mut part = part.to_vec();
            // The rest of a batch of fixed size is the last image again.
            if self.fixed_batch.is_some() {
                while part.len() < at_once * one {
                    part.extend_from_within(part.len() - one..);
                }
            }
            match self.compute(part) {
                Ok(found) => embeddings.extend_from_slice(&found[..wanted * self.embedding_size]),
                Err(what) => bail!("{}: {what}", self.path.display()),
            }
        }
        Tensor::from_vec(embeddings, (n, self.embedding_size), &Device::Cpu)
    }

    /// Returns the embeddings of one batch.
    fn compute(&self, images: Vec<f32>) -> std::result::Result<Vec<f32>, String> {
        let (s, n) = (self.side, images.len() / (3 * self.side * self.side));
        let shape = if self.has_channels_last { vec![n, s, s, 3] } else { vec![n, 3, s, s] };
        let found = self.runtime.run(Array { shape, values: images }, &self.output)?;
        match found.shape.first() == Some(&n) && found.values.len() == n * self.embedding_size {
            true => Ok(found.values),
            false => Err(format!(
                "expected embeddings ({n}, {}) from {}, found {:?}",
                self.embedding_size, self.output, found.shape
            )),
        }
    }

    /// Returns the name and the length of the output that is the embedding.
    fn embedding(&self, name: Option<&str>) -> std::result::Result<(String, usize), String> {
        let n = self.fixed_batch.unwrap_or(1);
        let s = self.side;
        let shape = if self.has_channels_last { vec![n, s, s, 3] } else { vec![n, 3, s, s] };
        let outputs = self.runtime.shapes(Array { values: vec![0.0; n * 3 * s * s], shape })?;
        let length = |shape: &[usize]| match shape {
            &[found, d] | &[found, d, 1, 1] => Some(d).filter(|d| found == n && LENGTHS.contains(d)),
            _ => None,
        };
        let listed = |outputs: &[Output]| {
            let text: Vec<String> = outputs.iter().map(|(name, shape)| format!("{name} {shape:?}")).collect();
            text.join(", ")
        };
        if let Some(name) = name {
            let found = outputs.iter().find(|(found, _)| found == name);
            let found = found.ok_or_else(|| format!("expected an output {name:?}, found {}", listed(&outputs)))?;
            let length = length(&found.1);
            return Ok((
                name.to_owned(),
                length.ok_or_else(|| not_an_embedding(n, &listed(std::slice::from_ref(found))))?,
            ));
        }
        let possible: Vec<Output> = outputs.iter().filter(|(_, shape)| length(shape).is_some()).cloned().collect();
        match &possible[..] {
            [(name, shape)] => Ok((name.clone(), length(shape).expect("it was filtered by it"))),
            [] => Err(not_an_embedding(n, &listed(&outputs))),
            several => Err(format!(
                "{} outputs may be the embedding: {}; name it (--embedding-output)",
                several.len(),
                listed(several)
            )),
        }
    }

    /// Whether each of two images at once has the embedding that it has alone; some graphs have the size of a batch
    /// built in, or mix its images.
    fn takes_batches(&self) -> std::result::Result<bool, String> {
        let image = |step: usize| -> Vec<f32> {
            (0..3 * self.side * self.side).map(|i| (i * step % 101) as f32 / 50.0 - 1.0).collect()
        };
        let alone = [self.compute(image(37))?, self.compute(image(61))?].concat();
        let Ok(both) = self.compute([image(37), image(61)].concat()) else { return Ok(false) };
        let largest = alone.iter().fold(0f32, |a, b| a.max(b.abs()));
        Ok(both.iter().zip(&alone).all(|(a, b)| (a - b).abs() <= SAME * largest || (a.is_nan() && b.is_nan())))
    }
}

/// Returns the hash of a graph, by its own, with the output that is the embedding.
fn digest_of(graph: &str, output: &str) -> String {
    hex(&Sha256::digest(format!("{graph}:{output}")))
}

fn not_an_embedding(n: usize, found: &str) -> String {
    let (from, to) = (LENGTHS.start(), LENGTHS.end());
    format!("expected an embedding ({n}, {from} to {to}) as output, found {found}")
}

/// Returns whether an input of square RGB images has its channels last, its side and its batch size, if they are fixed.
fn input(dims: &[Option<usize>]) -> std::result::Result<(bool, Option<usize>, Option<usize>), String> {
    let (has_channels_last, side) = match dims {
        [_, Some(3), h, w] if h == w => (false, *h),
        [_, h, w, Some(3)] if h == w => (true, *h),
        [_, None, h, w] if h == w => (false, *h),
        _ => {
            let text = |d: &Option<usize>| d.map_or_else(|| "any".to_owned(), |d| d.to_string());
            let found = dims.iter().map(text).collect::<Vec<_>>().join(", ");
            return Err(format!("expected square images (N, 3, S, S) or (N, S, S, 3) as input, found ({found})"));
        }
    };
    let is_possible = |range: std::ops::RangeInclusive<usize>, size: Option<usize>| {
        size.is_none_or(|size| range.contains(&size)).then_some(size)
    };
    let side = is_possible(8..=1024, side).ok_or("expected an input of 8 to 1024 pixels")?;
    let batch = is_possible(1..=1024, dims[0]).ok_or("expected batches of 1 to 1024 images")?;
    Ok((has_channels_last, side, batch))
}
