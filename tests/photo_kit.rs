//! Photos with faces and a detector for them, made for tests: every white square of 32 pixels on a grid of 32 is the
//! middle of a face, whose crop is the 112 pixels around it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage, imageops};
use maskinv::data::{ALIGNED_LANDMARKS, Dataset, ProceduralConfig, ProceduralFaces};
use maskinv::models::{Arch, Model, ModelConfig, save_model};
use maskinv::weights::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue, write_onnx};

use crate::cli::{maskinv, stdout, str};

/// A photo's sides: its longer one is that of the second look, so that both looks see the same grid.
pub const WIDTH: u32 = 320;
pub const HEIGHT: u32 = 256;
pub const CELL: u32 = 32;
/// Offset of a crop's corner from that of its square.
const CORNER: i64 = 40;

/// A detector and a network in a folder.
pub struct Kit {
    root: tempfile::TempDir,
}

impl Kit {
    pub fn new() -> Result<Self> {
        let root = tempfile::tempdir()?;
        write_detector(&root.path().join("detector.onnx"))?;
        let config = ModelConfig {
            arch: Arch::R18,
            width: 0.125,
            embedding_size: 32,
            input_size: 112,
            ..ModelConfig::default()
        };
        save_model(&root.path().join("model.safetensors"), &Model::new(&config, &Device::Cpu, 1)?, DType::F32)?;
        Ok(Self { root })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Runs a command with the detector.
    pub fn run(&self, args: &[&str]) -> Result<(Option<i32>, String, String)> {
        let detector = self.path("detector.onnx");
        let output = maskinv(&[args, &["--detector", str(&detector)]].concat())?;
        Ok((output.status.code(), stdout(&output), String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    pub fn save(&self, name: &str, image: &RgbImage) -> Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        image.save(&path)?;
        Ok(path)
    }
}

/// Writes YuNet's outputs as convolutions of one layer: those of stride 32 find white squares, the others nothing.
fn write_detector(path: &Path) -> Result<()> {
    let mut onnx = OnnxModel { opset: 11, ..OnnxModel::default() };
    onnx.inputs = vec![OnnxValue { name: "input".into(), dims: vec![None, Some(3), None, None] }];
    let size = (100.0 / CELL as f32).ln();
    let points: Vec<f32> = ALIGNED_LANDMARKS.as_flattened().iter().map(|v| (v - CORNER as f32) / CELL as f32).collect();
    let outputs = [("cls", vec![-253.0]), ("obj", vec![-253.0]), ("bbox", vec![0.5, 0.5, size, size]), ("kps", points)];
    for (name, bias) in outputs {
        for stride in [8usize, 16, 32] {
            let (name, c, num) = (format!("{name}_{stride}"), bias.len(), bias.len() * 3 * stride * stride);
            // Mean of a square: only a white one is above 253.
            let is_score = c == 1;
            let (factor, lower) = match (is_score, stride) {
                (true, 32) => (1.0 / (3 * stride * stride) as f32, 0.0),
                (true, _) => (0.0, -100.0),
                _ => (0.0, 0.0),
            };
            onnx.initializers.insert(format!("{name}.w"), Tensor::full(factor, (c, 3, stride, stride), &Device::Cpu)?);
            let bias: Vec<f32> = bias.iter().map(|b| b + lower).collect();
            onnx.initializers.insert(format!("{name}.b"), Tensor::new(bias, &Device::Cpu)?);
            debug_assert_eq!(num, c * 3 * stride * stride);
            let node = |op_type: &str, inputs: Vec<String>, output: &str, attributes| OnnxNode {
                op_type: op_type.into(),
                inputs,
                outputs: vec![output.into()],
                attributes,
            };
            let strides = OnnxAttribute::Ints(vec![stride as i64; 2]);
            let inputs = vec!["input".into(), format!("{name}.w"), format!("{name}.b")];
            let end = if is_score { format!("{name}.x") } else { name.clone() };
            onnx.nodes.push(node("Conv", inputs, &end, BTreeMap::from([("strides".into(), strides)])));
            if is_score {
                onnx.nodes.push(node("Sigmoid", vec![end], &name, BTreeMap::new()));
            }
            onnx.outputs.push(OnnxValue { name, dims: vec![] });
        }
    }
    Ok(write_onnx(path, &onnx)?)
}

/// A drawn face with a white square where the detector looks for one.
pub fn face(person: usize, number: usize) -> Result<RgbImage> {
    let faces = ProceduralFaces::new(ProceduralConfig { images_per_identity: 4, ..ProceduralConfig::default() })?;
    let mut face = faces.get(4 * person + number)?.image;
    // No white but the square's.
    face.iter_mut().for_each(|v| *v = (*v).min(200));
    let square = RgbImage::from_pixel(CELL, CELL, Rgb([255; 3]));
    imageops::replace(&mut face, &square, CORNER, CORNER);
    Ok(face)
}

/// A grey photo with faces at cells `(column, row)` of the grid.
pub fn photo(faces: &[(&RgbImage, [u32; 2])]) -> RgbImage {
    let mut photo = RgbImage::from_pixel(WIDTH, HEIGHT, Rgb([90; 3]));
    for (face, [column, row]) in faces {
        let [x, y] = [column, row].map(|v| i64::from(v * CELL) - CORNER);
        imageops::replace(&mut photo, *face, x, y);
    }
    photo
}

pub const LEFT: [u32; 2] = [2, 3];
pub const RIGHT: [u32; 2] = [7, 3];

/// A data set of photos, `people` identities with two photos each.
pub fn photo_set(kit: &Kit, people: usize) -> Result<PathBuf> {
    for person in 0..people {
        for number in 0..2 {
            let place = if number == 0 { LEFT } else { RIGHT };
            kit.save(&format!("set/p{person}/p{person}_{number}.png"), &photo(&[(&face(person, number)?, place)]))?;
        }
    }
    Ok(kit.path("set"))
}
