//! The margin on the target cosine of a classification head (ArcFace, Deng et al., CVPR 2019, eq. 3; CosFace, Wang et
//! al., CVPR 2018, eq. 4; ElasticFace, Boutros et al., CVPRW 2022, eq. 4 and 5), and its derivative.

use serde::{Deserialize, Serialize};

/// Quantity that the margin is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarginForm {
    /// The angle: `cos(theta + margin)`.
    Angular,
    /// The cosine: `cos(theta) - margin`.
    Cosine,
}

/// Gradient of the angular margin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarginGradient {
    /// The derivative of `cos(theta + m)` with respect to `cos(theta)`, `cos(m) + cos(theta) / sin(theta) * sin(m)`,
    /// with `sin(theta)` bounded away from zero so that it is finite at `|cos(theta)| = 1`. ElasticFace uses it without
    /// the bound.
    #[default]
    True,
    /// 1, as in insightface's ArcFace, which computes the angle without gradient.
    StraightThrough,
}

/// Lower bound of the `sin(theta)` that the true gradient divides by: f32 cosines resolve angles to about 5e-4 rad.
const MIN_SIN: f64 = 1e-3;

impl MarginForm {
    /// Returns the target logit before scaling, from the target cosine in `[-1, 1]`; `margin` is in radians for
    /// [`Self::Angular`].
    pub fn value(self, cosine: f64, margin: f64) -> f64 {
        match self {
            Self::Angular => (cosine.acos() + margin).cos(),
            Self::Cosine => cosine - margin,
        }
    }

    /// Returns the derivative of [`Self::value`] with respect to the cosine, as `gradient` defines it.
    pub fn slope(self, gradient: MarginGradient, cosine: f64, margin: f64) -> f64 {
        match (self, gradient) {
            (Self::Angular, MarginGradient::True) => {
                let sin = (1.0 - cosine * cosine).max(0.0).sqrt().max(MIN_SIN);
                margin.cos() + cosine / sin * margin.sin()
            }
            _ => 1.0,
        }
    }
}
