//! A face detector from a file, and photos through it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use image::RgbImage;
use rayon::prelude::*;

use super::boxes::{Detection, Maps, suppress};
use super::config::DetectConfig;
use super::{scrfd, yunet};
use crate::error::{Error, Result};
use crate::files;
use crate::models::lift;
use crate::nn::engine::{InferenceNetwork, Lowered};
use crate::nn::{Graph, Params};
use crate::ops::backend::Backend;
use crate::ops::cpu::{Cpu, CpuImages};
use crate::parallel::Each;
use crate::preprocessing::{Channels, Preprocessing};
use crate::weights::{OnnxModel, read_onnx};

/// Sides of the network's input are multiples of this.
const MULTIPLE: usize = 32;
/// Most pixels of the network's input.
const MAX_PIXELS: usize = 4096 * 4096;
/// Most sizes of photos that a network is kept prepared for.
const MAX_PREPARED: usize = 4;

/// Family of a detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    YuNet,
    Scrfd,
}

/// A face detector on the CPU: YuNet, or SCRFD with or without landmarks, from its ONNX file.
///
/// ```no_run
/// use std::path::Path;
///
/// use maskinv::data::{align_face, read_image};
/// use maskinv::face::{DetectConfig, Detector};
///
/// # fn main() -> maskinv::Result<()> {
/// let detector = Detector::open(Path::new("face_detection_yunet_2023mar.onnx"))?;
/// let photo = read_image(Path::new("photo.jpg"))?;
/// for face in detector.detect(&photo, &DetectConfig::default())? {
///     let crop = align_face(&photo, face.points()?)?;
///     println!("score {:.2}, {} pixels aligned", face.score, crop.len() / 3);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Detector {
    path: PathBuf,
    /// Hash of the file; none of a detector that is not from one.
    sha256: Option<String>,
    family: Family,
    graph: Graph,
    params: Params,
    /// The outputs of each level, in the order that the family's reader takes.
    levels: Vec<Vec<usize>>,
    /// The networks of the last sizes of input.
    prepared: Mutex<Vec<Prepared>>,
}

/// A network for one size of input.
#[derive(Debug)]
struct Prepared {
    /// Height and width.
    size: [usize; 2],
    network: Arc<InferenceNetwork<Cpu>>,
}

impl Detector {
    /// Reads a detector. Which one it is, its outputs say.
    ///
    /// # Errors
    /// When the file cannot be read, or is neither YuNet nor SCRFD.
    pub fn open(path: &Path) -> Result<Self> {
        let sha256 = Some(files::sha256(path)?);
        Ok(Self { sha256, ..Self::of(&read_onnx(path)?, path)? })
    }

    /// File that it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of its file, 64 hexadecimal digits; none of a detector that is not from a file.
    pub fn sha256(&self) -> Option<&str> {
        self.sha256.as_deref()
    }

    /// Returns the detector of a graph, which was read from `path`.
    fn of(onnx: &OnnxModel, path: &Path) -> Result<Self> {
        let refused = |what: String| Error::Checkpoint { path: path.to_owned(), what };
        let lifted = lift(onnx).map_err(|what| refused(format!("not a face detector: {what}")))?;
        let names: Vec<&str> = lifted.outputs.iter().map(String::as_str).collect();
        let Some((family, levels)) = recognised(&names, &lifted.channels) else {
            return Err(refused(format!("expected YuNet or SCRFD, found outputs of {:?} channels", lifted.channels)));
        };
        let (graph, params) = (lifted.graph, lifted.params);
        Ok(Self { path: path.to_owned(), sha256: None, family, graph, params, levels, prepared: Mutex::default() })
    }

    /// Returns the detections in a photo that lies at `border` pixels from the upper and the left edge of the network's
    /// input, which is black around it, in the photo's pixels.
    ///
    /// # Errors
    /// When the input is empty or too large.
    pub(super) fn look(&self, photo: &RgbImage, border: usize, config: &DetectConfig) -> Result<Vec<Detection>> {
        let (width, height) = (photo.width() as usize, photo.height() as usize);
        let size = self.padded([height + 2 * border, width + 2 * border]);
        if width == 0 || height == 0 || size[0].saturating_mul(size[1]) > MAX_PIXELS {
            return Err(Error::Detection(format!(
                "expected photos that are searched at 1 to {MAX_PIXELS} pixels, found {width}x{height}"
            )));
        }
        let maps = Cpu::enter(|| self.run(photo, border, size))?;
        let back = |v: f32| v - border as f32;
        let moved = |Detection { bounds, landmarks, score }: Detection| {
            let landmarks = landmarks.map(|points| points.map(|point| point.map(back)));
            Detection { bounds: bounds.map(back), landmarks, score }
        };
        let found = self.found(&maps, config).into_iter().map(moved);
        Ok(found.filter(|face| face.bounds.iter().all(|x| x.is_finite())).collect())
    }

    /// Keeps the best of each group of detections that overlap.
    pub(super) fn choose(&self, found: Vec<Detection>, config: &DetectConfig) -> Vec<Detection> {
        suppress(found, config.max_overlap, self.overlap())
    }

    /// Overlap of two detections, as the family's published reader measures it.
    pub(super) fn overlap(&self) -> fn(&Detection, &Detection) -> f32 {
        match self.family {
            Family::YuNet => yunet::overlap,
            Family::Scrfd => scrfd::overlap,
        }
    }

    /// Size of the network's input for a photo, `[height, width]`.
    fn padded(&self, [h, w]: [usize; 2]) -> [usize; 2] {
        let [h, w] = [h, w].map(|side| side.next_multiple_of(MULTIPLE));
        match self.family {
            Family::YuNet => [h, w],
            // The published reader pads to a square.
            Family::Scrfd => [h.max(w); 2],
        }
    }

    /// Returns the outputs for a photo in a black input.
    fn run(&self, photo: &RgbImage, border: usize, [h, w]: [usize; 2]) -> Result<Vec<Maps>> {
        let (channels, mean, std) = match self.family {
            Family::YuNet => (Channels::Bgr, 0.0, 1.0),
            Family::Scrfd => (Channels::Rgb, 127.5, 128.0),
        };
        let table = Preprocessing { channels, mean, std, ..Preprocessing::default() }.table();
        let order = if channels == Channels::Bgr { [2, 1, 0] } else { [0, 1, 2] };
        let mut values = vec![table[0]; 3 * h * w];
        let row_len = 3 * photo.width() as usize;
        values.par_chunks_mut(3 * w).skip(border).zip(photo.as_raw().par_chunks_exact(row_len)).each(&|(to, row)| {
            for (to, pixel) in to[3 * border..].chunks_exact_mut(3).zip(row.chunks_exact(3)) {
                for (value, from) in to.iter_mut().zip(order) {
                    *value = table[usize::from(pixel[from])];
                }
            }
        });
        let network = self.prepared([h, w])?;
        let outputs = network.run_all(&CpuImages::Rows(values), 1)?;
        let maps = outputs.into_iter().zip(network.output_shapes());
        Ok(maps.map(|(values, [_, _, width, _])| Maps { values, width }).collect())
    }

    /// Returns the network for an input of this size.
    fn prepared(&self, size: [usize; 2]) -> Result<Arc<InferenceNetwork<Cpu>>> {
        let known = || self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prepared) = known().iter().find(|prepared| prepared.size == size) {
            return Ok(prepared.network.clone());
        }
        let lowered = Lowered::of(&self.graph, &self.params, [1, size[0], size[1]], &Cpu)?;
        let network = Arc::new(InferenceNetwork::new(lowered, self.params.parts(), None, &Cpu)?);
        let mut known = known();
        known.insert(0, Prepared { size, network: network.clone() });
        known.truncate(MAX_PREPARED);
        Ok(network)
    }

    fn found(&self, maps: &[Maps], config: &DetectConfig) -> Vec<Detection> {
        let least = config.min_score;
        let mut found = Vec::new();
        for (i, outputs) in self.levels.iter().enumerate() {
            let of = |at: usize| &maps[outputs[at]];
            found.extend(match self.family {
                Family::YuNet => yunet::level([of(0), of(1), of(2), of(3)], yunet::STRIDES[i], least),
                Family::Scrfd => {
                    let points = (outputs.len() > 2).then(|| of(2));
                    scrfd::level(of(0), of(1), points, scrfd::STRIDES[i], least)
                }
            });
        }
        self.choose(found, config)
    }
}

/// Returns the family of a detector, and the outputs of each of its levels, from the names and channels of its outputs.
fn recognised(names: &[&str], channels: &[usize]) -> Option<(Family, Vec<Vec<usize>>)> {
    let named = |name: String| names.iter().position(|found| *found == name);
    let of_yunet = |stride: &usize| -> Option<Vec<usize>> {
        let output = |(name, c): (&str, usize)| named(format!("{name}_{stride}")).filter(|at| channels[*at] == c);
        yunet::OUTPUTS.into_iter().map(output).collect()
    };
    if let Some(levels) = yunet::STRIDES.iter().map(of_yunet).collect::<Option<Vec<_>>>() {
        return Some((Family::YuNet, levels));
    }
    // All scores, then all boxes, then all landmarks, if there are any.
    let expected = [1, 4, 10].map(|c| [c * scrfd::ANCHORS; 3]).concat();
    let num_kinds = channels.len() / 3;
    let is_scrfd = (2..=3).contains(&num_kinds) && *channels == expected[..3 * num_kinds];
    let level = |level: usize| (0..num_kinds).map(|kind| 3 * kind + level).collect();
    is_scrfd.then(|| (Family::Scrfd, (0..3).map(level).collect()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{Device, Tensor};
    use image::Rgb;

    use super::*;
    use crate::weights::{OnnxAttribute, OnnxNode, OnnxValue};

    /// The graph of a detector that takes every white square of a level's places for a face as large as the square:
    /// each output is a convolution whose filter is as large as its stride, moved to the last axis and reshaped.
    fn graph(outputs: &[(&str, usize, usize)]) -> OnnxModel {
        let mut onnx = OnnxModel { opset: 11, ..OnnxModel::default() };
        onnx.inputs = vec![OnnxValue { name: "input".into(), dims: vec![None, Some(3), None, None] }];
        let node = |op_type: &str, inputs: &[&str], output: String, attributes: Vec<(&str, OnnxAttribute)>| OnnxNode {
            op_type: op_type.into(),
            inputs: inputs.iter().map(|name| (*name).to_owned()).collect(),
            outputs: vec![output],
            attributes: attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        };
        for &(name, c, stride) in outputs {
            let is_score = ["cls", "obj", "score"].iter().any(|score| name.starts_with(score));
            // A mean of at least 254 gives more than 0.6 after the sigmoid.
            let (factor, bias) = if is_score { (1.0, -253.0) } else { (0.0, 0.0) };
            let filter = vec![factor / (3 * stride * stride) as f32; c * 3 * stride * stride];
            let filter = Tensor::from_vec(filter, (c, 3, stride, stride), &Device::Cpu).expect("a filter");
            onnx.initializers.insert(format!("{name}.w"), filter);
            let bias = Tensor::full(bias as f32, c, &Device::Cpu).expect("a bias");
            onnx.initializers.insert(format!("{name}.b"), bias);
            let shape = Tensor::new(&[1i64, -1, c as i64], &Device::Cpu).expect("a shape");
            onnx.initializers.insert(format!("{name}.shape"), shape);
            let ints = |value: usize, len: usize| OnnxAttribute::Ints(vec![value as i64; len]);
            let inputs = ["input", &format!("{name}.w"), &format!("{name}.b")];
            onnx.nodes.push(node("Conv", &inputs, format!("{name}.x"), vec![("strides", ints(stride, 2))]));
            let last = OnnxAttribute::Ints(vec![0, 2, 3, 1]);
            onnx.nodes.push(node("Transpose", &[&format!("{name}.x")], format!("{name}.t"), vec![("perm", last)]));
            let inputs = [&*format!("{name}.t"), &format!("{name}.shape")];
            let end = if is_score { format!("{name}.r") } else { name.to_owned() };
            onnx.nodes.push(node("Reshape", &inputs, end.clone(), vec![]));
            if is_score {
                onnx.nodes.push(node("Sigmoid", &[&end], name.to_owned(), vec![]));
            }
            onnx.outputs.push(OnnxValue { name: name.to_owned(), dims: vec![] });
        }
        onnx
    }

    fn yunet() -> OnnxModel {
        let names: Vec<(String, usize, usize)> = yunet::OUTPUTS
            .iter()
            .flat_map(|(name, c)| yunet::STRIDES.map(|stride| (format!("{name}_{stride}"), *c, stride)))
            .collect();
        graph(&names.iter().map(|(name, c, stride)| (name.as_str(), *c, *stride)).collect::<Vec<_>>())
    }

    fn scrfd(kinds: &[&str]) -> OnnxModel {
        let outputs = [("score", 2), ("box", 8), ("points", 20)];
        let names: Vec<(String, usize, usize)> = outputs
            .iter()
            .filter(|(name, _)| kinds.contains(name))
            .flat_map(|(name, c)| scrfd::STRIDES.map(|stride| (format!("{name}{stride}"), *c, stride)))
            .collect();
        graph(&names.iter().map(|(name, c, stride)| (name.as_str(), *c, *stride)).collect::<Vec<_>>())
    }

    fn opened(onnx: &OnnxModel) -> Result<Detector> {
        Detector::of(onnx, Path::new("detector.onnx"))
    }

    /// A black photo with a white square of 16 pixels at `(32, 16)`.
    fn photo(width: u32, height: u32) -> RgbImage {
        let is_white = |x: u32, y: u32| (32..48).contains(&x) && (16..32).contains(&y);
        RgbImage::from_fn(width, height, |x, y| if is_white(x, y) { Rgb([255; 3]) } else { Rgb([0; 3]) })
    }

    const AS_IT_IS: DetectConfig = DetectConfig::AS_IT_IS;

    #[test]
    fn faces_are_found_where_they_are_in_photos_of_any_size() -> Result<()> {
        let detector = opened(&yunet())?;
        for (width, height) in [(100, 60), (64, 64), (50, 33)] {
            let faces = detector.detect(&photo(width, height), &AS_IT_IS)?;
            // Four places of the finest level and one of the next, whose boxes do not overlap by more than 0.3.
            let largest =
                faces.iter().find(|face| face.bounds[2] - face.bounds[0] > 15.0).expect("a face of 16 pixels");
            assert_eq!(largest.bounds, [24.0, 8.0, 40.0, 24.0], "{width}x{height}");
            assert_eq!(largest.landmarks, Some([[32.0, 16.0]; 5]));
            assert_eq!(faces.len(), 5, "{width}x{height}: {faces:?}");
        }
        // Searched at half the size, it is where it was.
        let config = DetectConfig { longer_side: Some(50), ..AS_IT_IS };
        let faces = detector.detect(&photo(100, 60), &config)?;
        assert!(faces.iter().any(|face| face.bounds == [24.0, 8.0, 40.0, 24.0]), "{faces:?}");
        assert!(detector.detect(&RgbImage::new(300, 200), &DetectConfig::default())?.is_empty());
        Ok(())
    }

    #[test]
    fn scrfd_is_known_by_its_outputs() -> Result<()> {
        let detector = opened(&scrfd(&["score", "box", "points"]))?;
        // (255 - 127.5) / 128 is below the mean that the filter asks for: nothing is found, and that is no error.
        assert_eq!(detector.family, Family::Scrfd);
        assert!(detector.detect(&photo(100, 60), &AS_IT_IS)?.is_empty());
        // Without landmarks there are boxes alone.
        let boxes = opened(&scrfd(&["score", "box"]))?;
        assert_eq!(boxes.family, Family::Scrfd);
        let faces = boxes.detect(&photo(100, 60), &DetectConfig { min_score: 0.0, ..AS_IT_IS })?;
        assert!(!faces.is_empty() && faces.iter().all(|face| face.landmarks.is_none()));
        assert!(faces[0].points().unwrap_err().to_string().contains("gives boxes alone"));
        Ok(())
    }

    #[test]
    fn other_files_are_named() {
        let text = |onnx: &OnnxModel| opened(onnx).expect_err("no detector").to_string();
        let mut fewer = yunet();
        fewer.outputs.pop();
        assert!(text(&fewer).contains("expected YuNet or SCRFD, found outputs of [1, 1, 1,"));
        let mut other = yunet();
        other.nodes[0].op_type = "LSTM".into();
        assert!(text(&other).contains("not a face detector: cls_8.x (LSTM): the engine has no such operation"));
        let error = Detector::open(Path::new("nowhere.onnx")).expect_err("no file").to_string();
        assert!(error.contains("nowhere.onnx"), "{error}");
    }

    #[test]
    fn photos_without_pixels_or_with_too_many_are_an_error_and_a_nan_is_no_face() -> Result<()> {
        let mut onnx = yunet();
        let error = |detector: &Detector, width, height, config: &DetectConfig| {
            detector.detect(&RgbImage::new(width, height), config).expect_err("an error").to_string()
        };
        let detector = opened(&onnx)?;
        assert!(error(&detector, 0, 0, &DetectConfig::default()).contains("found 0x0"));
        assert!(error(&detector, 50_000, 400, &AS_IT_IS).contains("found 50000x400"));
        for config in [DetectConfig::default(), DetectConfig { min_face: Some(20.0), ..DetectConfig::default() }] {
            assert!(detector.detect(&RgbImage::new(50_000, 1), &config)?.is_empty());
            assert!(detector.detect(&RgbImage::new(1, 1), &config)?.is_empty());
        }
        let nan = Tensor::full(f32::NAN, 1, &Device::Cpu)?;
        onnx.initializers.extend(BTreeMap::from([("cls_8.b".to_owned(), nan.clone()), ("cls_16.b".to_owned(), nan)]));
        assert!(opened(&onnx)?.detect(&photo(100, 60), &AS_IT_IS)?.is_empty());
        Ok(())
    }
}
