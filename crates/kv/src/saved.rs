//! A cache as it is written down, and read back from bytes that may be damaged or made up.
//!
//! Formats whose caches can be saved are [`exact`](KvFormat::Exact) and [`layered`](KvFormat::Layered): what is read goes on to the bit
//! as what was written. Which shape, format and calibration belong to the bytes is for the caller to remember and to check.

use crate::exact::ExactHead;
use crate::layered::{Closing, LayeredHead};
use crate::{Calibration, KvCache, KvError, KvFormat, KvShape, Layer};
use mosaickv_kernels::saved::{Input, Malformed, write_count, write_numbers};
use std::io::{self, Write};
use std::sync::Arc;

/// How a layer is kept.
const EXACT: u8 = 0;
const LAYERED: u8 = 1;

/// Why a cache can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The bytes are none that were written.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The shape, the format or the calibration is none that a cache may have, or the parts do not fit each other.
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl KvFormat {
    /// Whether its caches can be written down.
    pub fn can_be_saved(self) -> bool {
        matches!(self, KvFormat::Exact | KvFormat::Layered(_))
    }
}

impl KvCache {
    /// Writes it down. What works in the background for it is waited for. Of a format that
    /// [can't be saved](KvFormat::can_be_saved) this is an error.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for layer in &self.layers {
            match layer {
                Layer::Exact(heads) => {
                    write_numbers(out, &[EXACT])?;
                    heads.iter().try_for_each(|head| head.write(out))?;
                }
                Layer::Layered(heads) => {
                    write_numbers(out, &[LAYERED])?;
                    heads.iter().try_for_each(|head| head.write(out))?;
                }
                Layer::Packed(_) | Layer::Baseline(_) => {
                    let why = format!("a cache in the format {} cannot be saved", self.format);
                    return Err(io::Error::new(io::ErrorKind::Unsupported, why));
                }
            }
        }
        write_count(out, self.closings.len())?;
        for (layer, closing) in &self.closings {
            write_count(out, *layer)?;
            closing.write(out)?;
        }
        Ok(())
    }

    /// A cache that was written down, of a model of this shape and with this calibration. All of `bytes` are its.
    pub fn read(
        bytes: &[u8],
        shape: KvShape,
        format: KvFormat,
        calibration: Option<Arc<Calibration>>,
    ) -> Result<KvCache, ReadError> {
        let mut cache = KvCache::new(shape, format)?;
        if let Some(calibration) = calibration {
            cache = cache.with_calibration(calibration)?;
        }
        cache.forget_queries();
        let mut input = Input::new(bytes);
        for layer in 0..shape.layers {
            cache.layers[layer] = read_layer(&mut input, &cache, layer)?;
        }
        let closings = input.count()?;
        Malformed::unless(closings <= shape.layers, || format!("{closings} segments that are leaving"))?;
        for _ in 0..closings {
            let layer = input.count()?;
            let Some(Layer::Layered(heads)) = cache.layers.get(layer) else {
                return Err(Malformed(format!("a segment that leaves layer {layer}")).into());
            };
            let is_new = cache.closings.iter().all(|(other, _)| *other != layer);
            Malformed::unless(is_new, || format!("two segments that leave layer {layer}"))?;
            let closing = Closing::read(&mut input, heads)?;
            cache.closings.push((layer, Arc::new(closing)));
        }
        Malformed::unless(input.left() == 0, || format!("{} bytes too many", input.left()))?;
        cache.check_leaving()?;
        cache.check()?;
        Ok(cache)
    }

    /// What leaves a window is on its way to the tail, and nothing else is.
    fn check_leaving(&self) -> Result<(), Malformed> {
        let leaves = |layer: &Layer| match layer {
            Layer::Layered(heads) => heads.iter().any(LayeredHead::is_leaving),
            _ => false,
        };
        for (l, layer) in self.layers.iter().enumerate() {
            let is_closing = self.closings.iter().any(|(layer, _)| *layer == l);
            Malformed::unless(is_closing || !leaves(layer), || {
                format!("nobody works on what leaves layer {l}")
            })?;
        }
        Ok(())
    }
}

fn read_layer(input: &mut Input, cache: &KvCache, layer: usize) -> Result<Layer, Malformed> {
    let KvCache { shape, format, calibration, .. } = cache;
    let heads = 0..shape.kv_heads;
    match (input.number::<u8>()?, format, calibration) {
        (EXACT, ..) => {
            let window = shape.window_of(layer);
            let read = heads.map(|_| ExactHead::read(input, shape.head_dim, window));
            Ok(Layer::Exact(read.collect::<Result<_, _>>()?))
        }
        (LAYERED, KvFormat::Layered(settings), Some(calibration)) => {
            let first = layer * shape.kv_heads;
            let read = heads.map(|g| LayeredHead::read(input, *shape, (calibration, first + g), *settings));
            Ok(Layer::Layered(read.collect::<Result<_, _>>()?))
        }
        (kind, ..) => Err(Malformed(format!("a layer of kind {kind} in a cache of the format {format}"))),
    }
}
