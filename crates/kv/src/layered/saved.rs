//! A layered head as it is written down: without the places of its tokens, and without how often they were read.

use super::asked::Asked;
use super::select::PageReads;
use super::tail::SWAP_AFTER;
use super::{Calibration, Closing, Layered, LayeredHead, SINKS, Scales, Segment};
use crate::KvShape;
use half::f16;
use mosaickv_kernels::exact::ExactPage;
use mosaickv_kernels::layered::{Pages, Profile, SKETCH};
use mosaickv_kernels::saved::{Input, Malformed, write_count, write_numbers};
use std::io::{self, Write};
use std::sync::Arc;

/// No rate, and no scale of what was asked, comes near it.
const LARGEST: f32 = 1e9;

/// Tokens without bits, or positions, that a head may have: no sum of some of them overflows.
const MOST_TOKENS: usize = u32::MAX as usize;

impl Segment {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_count(out, self.dropped)?;
        self.pages.write(out)
    }

    fn read(input: &mut Input, head_dim: usize) -> Result<Segment, Malformed> {
        let dropped = input.count()?;
        Malformed::unless(dropped <= MOST_TOKENS, || format!("{dropped} tokens without bits"))?;
        Ok(Segment { dropped, ..Segment::of(Pages::read(input, head_dim)?) })
    }
}

impl LayeredHead {
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_numbers(out, &self.sinks)?;
        write_numbers(out, &self.scales.numbers)?;
        self.segments().into_iter().try_for_each(|segment| segment.write(out))?;
        write_numbers(out, &self.profiles.0.counts())?;
        write_numbers(out, &self.profiles.1.counts())?;
        write_numbers(out, &[self.rate, self.distortion[0], self.distortion[1]])?;
        self.asked.write(out)?;
        write_numbers(out, &[self.stay, u8::from(self.buffer.is_some())])?;
        self.buffer.as_ref().map_or(Ok(()), |buffer| buffer.write(out))
    }

    /// Head `index` of the calibration's.
    pub(crate) fn read(
        input: &mut Input,
        shape: KvShape,
        (calibration, index): (&Arc<Calibration>, usize),
        settings: Layered,
    ) -> Result<LayeredHead, Malformed> {
        let d = shape.head_dim;
        let sinks: Vec<f16> = input.numbers(SINKS * 2 * d)?;
        Malformed::unless(sinks.iter().all(|x| x.is_finite()), || "first tokens that are not finite".into())?;
        let numbers: Vec<f16> = input.numbers(4 * d)?;
        let mut segment = || Segment::read(input, d).map(Arc::new);
        let (prompt, tail, leaving, window) = (segment()?, segment()?, segment()?, segment()?);
        // Its last page takes what leaves the buffer.
        Malformed::unless(!window.pages.pages().is_empty(), || "a window without a page".into())?;
        let keys = Profile::from_counts(input.number()?, d, SKETCH)?;
        let values = Profile::from_counts(input.number()?, d, 0)?;
        let [rate, of_keys, of_values]: [f32; 3] = input.number()?;
        Malformed::unless((0.0..=LARGEST).contains(&rate), || format!("{rate} bytes a token"))?;
        let asked = Asked::read(input, (shape.group(), d))?;
        let [stay, has_buffer]: [u8; 2] = input.number()?;
        let buffer = if has_buffer == 0 { None } else { Some(ExactPage::read(input, d)?) };
        let head = LayeredHead {
            calibration: calibration.clone(),
            index,
            sinks: sinks.into(),
            scales: Arc::new(Scales { numbers: numbers.into() }),
            prompt,
            tail,
            leaving,
            window,
            profiles: (keys, values),
            rate,
            distortion: [of_keys, of_values],
            asked,
            reads: PageReads::default(),
            stay,
            settings,
            buffer,
        };
        // Until they are in the tail no others may leave, and that is before two more pages are full.
        let fits = head.leaving.tokens() == 0 || head.window.pages.pages().len() <= usize::from(stay) + 2;
        Malformed::unless(fits, || "a window that is too long for what is leaving it".into())?;
        head.check().map_err(Malformed)?;
        Ok(head)
    }
}

impl Asked {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_count(out, self.positions.len())?;
        write_numbers(out, &self.positions)?;
        write_numbers(out, &self.bytes)?;
        write_numbers(out, &self.scales)
    }

    fn read(input: &mut Input, (rows, d): (usize, usize)) -> Result<Asked, Malformed> {
        let count = input.count()?;
        let fits = count <= input.left();
        Malformed::unless(fits, || format!("{count} remembered steps in {} bytes", input.left()))?;
        let asked = Asked {
            positions: input.numbers(count)?,
            bytes: input.numbers(count.saturating_mul(rows * d))?,
            scales: input.numbers(count.saturating_mul(rows))?,
        };
        let fits = asked.scales.iter().flatten().all(|x| x.abs() <= LARGEST);
        Malformed::unless(fits, || "scales of what was asked that are not finite".into())?;
        Ok(asked)
    }
}

impl Closing {
    /// Does the work, or waits for it, if it is not done.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_count(out, self.since)?;
        self.stored().iter().try_for_each(|segment| segment.write(out))
    }

    /// Of a layer with these heads.
    pub(crate) fn read(input: &mut Input, heads: &[LayeredHead]) -> Result<Closing, Malformed> {
        let since = input.count()?;
        let tokens = heads.first().map_or(0, LayeredHead::tokens);
        let fits = since <= tokens && tokens < since + SWAP_AFTER;
        Malformed::unless(fits, || format!("a segment that left at token {since} of {tokens}"))?;
        let stored: Result<Vec<_>, _> =
            heads.iter().map(|head| Segment::read(input, head.head_dim())).collect();
        let stored = stored?;
        let fits = heads.iter().zip(&stored).all(|(head, stored)| head.leaving.tokens() == stored.tokens());
        Malformed::unless(fits, || "segments that came back with other tokens".into())?;
        Ok(Closing::done(since, stored))
    }
}
