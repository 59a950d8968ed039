//! Averages of networks' weights.

use candle_core::Device;

use crate::error::Result;
use crate::models::Model;

/// Returns the network whose float weights are the sum of those of `models`, each multiplied by its share; counters,
/// preprocessing and machine are those of `first`.
pub(super) fn average((share, first): (f64, &Model), others: &[(f64, &Model)]) -> Result<Model> {
    let mut state = first.params().state()?;
    let others = others.iter().map(|(share, model)| Ok((*share, model.params().state()?)));
    let others = others.collect::<Result<Vec<_>>>()?;
    for (name, weights) in state.iter_mut().filter(|(_, t)| t.dtype().is_float()) {
        *weights = (&*weights * share)?;
        for (share, other) in &others {
            *weights = (&*weights + (&other[name] * *share)?)?;
        }
    }
    let averaged = Model::frozen(first.config(), state, &Device::Cpu)?;
    Ok(averaged.with_preprocessing(first.preprocessing().clone()).on(first.machine()))
}
