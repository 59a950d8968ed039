//! Template-level knowledge distillation: the student's embedding of a masked face is pulled towards the teacher's
//! embedding of the clean one (Huber et al., FG 2021, eq. 4).

use serde::{Deserialize, Serialize};

use crate::ops::distance::DistillKind;

/// Distillation settings; the default is no distillation, as in the teacher's own training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillConfig {
    /// Distance between the embeddings.
    pub kind: DistillKind,
    /// Weight of the distance in the objective: 100 for MaskInv-LG, 3000 for MaskInv-HG, 0 for no distillation.
    pub lambda: f64,
    /// Weight of the margin loss: 1 in the paper; with 0 the class centres are not trained.
    pub margin_weight: f64,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self { kind: DistillKind::Mse, lambda: 0.0, margin_weight: 1.0 }
    }
}

impl DistillConfig {
    /// Whether class centres are trained.
    pub(crate) fn trains_head(&self) -> bool {
        self.margin_weight > 0.0
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        if !(self.lambda.is_finite() && self.lambda >= 0.0) {
            let what = format!("distill.lambda: expected 0 or more, found {}", self.lambda);
            return Err(crate::Error::Config(what));
        }
        if !(self.margin_weight.is_finite() && self.margin_weight >= 0.0) {
            let what = format!("distill.margin_weight: expected 0 or more, found {}", self.margin_weight);
            return Err(crate::Error::Config(what));
        }
        if self.lambda == 0.0 && self.margin_weight == 0.0 {
            return Err(crate::Error::Config("distill: lambda and margin_weight are both 0: nothing to learn".into()));
        }
        Ok(())
    }
}
