//! Export and import of our networks as ONNX graphs.
//!
//! Both use [`Graph`](crate::nn::Graph). Export writes it node by node. Import matches a file against it node by node
//! from the output back, so that a file is accepted only if it computes what our network computes. Before that the
//! graph is simplified: what exporters write in several ways is made one.

mod export;
mod file;
mod import;
mod lift;
mod maps;
mod matching;
mod qdq;
mod simplify;

pub use export::to_onnx;
pub use import::from_onnx;
pub(crate) use lift::lift;
pub(super) use qdq::take as take_quantised;

/// What is wrong with a graph, in words.
type Result<T> = std::result::Result<T, String>;

#[cfg(test)]
pub(super) mod tests {
    use candle_core::{DType, Device};

    use super::file::File;
    use super::*;
    use crate::nn::{Graph, Init, Layer, Op, Params};
    use crate::ops::conv::ConvConfig;
    use crate::ops::pool::Window;
    use crate::weights::{OnnxAttribute, OnnxModel};

    /// A pyramid of two sizes: what none of our networks has.
    pub(super) fn pyramid() -> candle_core::Result<(Graph, Params)> {
        let (mut graph, mut params) = (Graph::new(), Params::new(DType::F32, &Device::Cpu, 0));
        let mut conv = |channels, path| {
            Layer::conv2d(channels, 1, ConvConfig::default(), Init::Normal(0.5), params.root().sub(path))
        };
        let [stem, join] = [conv([3, 4], "stem")?, conv([8, 4], "join")?];
        let fine = graph.chain(Graph::INPUT, [stem]);
        let coarse = graph.push(Op::MaxPool(Window { size: 3, stride: 2, padding: 1 }), "", &[fine]);
        let coarse = graph.push(Op::Upsample { factor: 2 }, "", &[coarse]);
        let all = graph.push(Op::Concat, "", &[fine, coarse]);
        graph.chain(all, [join]);
        Ok((graph, params))
    }

    #[test]
    fn pooling_upsampling_and_concatenation_are_written_and_known_again() -> candle_core::Result<()> {
        let (graph, params) = pyramid()?;
        let state = params.state()?;
        let onnx = export::of_graph(&graph, &state, 8, 4)?;
        let matched = |onnx: &OnnxModel| -> Result<usize> {
            let file = File::new(onnx)?;
            let taken = matching::matched(&file, &graph, params.shapes(), "embedding")?;
            assert!(taken.tensors.keys().eq(state.keys()));
            Ok(taken.tensors.len())
        };
        assert_eq!(matched(&onnx), Ok(2));
        let text = |value: &str| OnnxAttribute::Text(value.to_owned());
        type Change = (&'static str, &'static str, OnnxAttribute, &'static str);
        let changes: [Change; 7] = [
            ("MaxPool", "kernel_shape", OnnxAttribute::Ints(vec![2, 2]), "found Window { size: 2,"),
            ("MaxPool", "strides", OnnxAttribute::Ints(vec![2, 1]), "the same on all sides, found [2, 1]"),
            ("MaxPool", "ceil_mode", OnnxAttribute::Int(1), "sides rounded down"),
            ("MaxPool", "auto_pad", text("SAME_UPPER"), "explicit pads"),
            ("Resize", "mode", text("linear"), "expected nearest upsampling, found linear"),
            ("Resize", "nearest_mode", text("ceil"), "found nearest, asymmetric, ceil"),
            ("Concat", "axis", OnnxAttribute::Int(2), "expected a concatenation, found Concat"),
        ];
        for (op_type, name, value, words) in changes {
            let mut other = onnx.clone();
            let node = other.nodes.iter_mut().find(|node| node.op_type == op_type).expect("it is in the graph");
            node.attributes.insert(name.to_owned(), value);
            let error = matched(&other).expect_err(words);
            assert!(error.contains(words), "{error}");
        }
        // As PyTorch's exporter writes nearest upsampling, and with another factor.
        let mut other = onnx.clone();
        let resize = other.nodes.iter_mut().find(|node| node.op_type == "Resize").expect("it is in the graph");
        resize.attributes.insert("coordinate_transformation_mode".into(), text("half_pixel"));
        resize.attributes.insert("nearest_mode".into(), text("round_prefer_floor"));
        assert_eq!(matched(&other), Ok(2));
        let (scales, _) = onnx.initializers.iter().find(|(name, _)| name.ends_with(".scales")).expect("scales");
        let thrice = candle_core::Tensor::new(&[1f32, 1.0, 3.0, 3.0], &Device::Cpu)?;
        other.initializers.insert(scales.clone(), thrice);
        assert!(matched(&other).expect_err("another factor").contains("expected upsampling by 2, found 3"));
        // Parts in another order are another network.
        let mut other = onnx.clone();
        other.nodes.iter_mut().filter(|node| node.op_type == "Concat").for_each(|node| node.inputs.reverse());
        assert!(matched(&other).is_err());
        Ok(())
    }
}
