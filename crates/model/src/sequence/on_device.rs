//! The same passes of sequences whose model is on a GPU.

use super::{ForwardError, Share, steps_and_prompts};
use crate::device::{Device, OnDevice, Prompt, Step};
use mosaickv_kernels::Pool;
use mosaickv_kv::device::{Reads, reads_of};

/// Steps of all sequences together, token by token, then prompts one by one. `each` gets the logits of a share in order of its tokens.
pub(super) fn read(
    device: &Device,
    shares: &mut [Share],
    done: &mut dyn FnMut(usize),
    each: &mut dyn FnMut(usize, usize, &[f32]),
) -> Result<(), ForwardError> {
    let Some(pool) = shares.first().map(|share| share.sequence.pool) else { return Ok(()) };
    let mut device = device.lock();
    let (steps, prompts) = steps_and_prompts(shares);
    let first_prompt = steps.len();
    let most = steps.iter().map(|share| share.tokens.len()).max().unwrap_or(0);
    for t in 0..most {
        for members in together(steps, t, device.most_sequences()) {
            step(&mut device, (steps, &members), (t, pool), each)?;
        }
    }
    for (i, share) in prompts.iter_mut().enumerate() {
        prompt(&mut device, share, pool, done, &mut |t, logits| each(first_prompt + i, t, logits))?;
    }
    Ok(())
}

/// The shares that have a token `t`, by those that can take a step together: they read alike, and are not too many.
fn together(steps: &[Share], t: usize, most: usize) -> Vec<Vec<usize>> {
    let mut groups: Vec<(Reads, Vec<usize>)> = vec![];
    for (i, share) in steps.iter().enumerate().filter(|(_, share)| t < share.tokens.len()) {
        let reads = reads_of(&share.sequence.cache);
        match groups.iter_mut().find(|(other, members)| *other == reads && members.len() < most) {
            Some((_, members)) => members.push(i),
            None => groups.push((reads, vec![i])),
        }
    }
    groups.into_iter().map(|(_, members)| members).collect()
}

fn step(
    device: &mut OnDevice,
    (shares, members): (&mut [Share], &[usize]),
    (t, pool): (usize, &Pool),
    each: &mut dyn FnMut(usize, usize, &[f32]),
) -> Result<(), ForwardError> {
    let (mut steps, mut wanted) = (vec![], vec![]);
    for (i, share) in shares.iter_mut().enumerate().filter(|(i, _)| members.contains(i)) {
        let is_wanted = t >= share.first_wanted();
        if is_wanted {
            wanted.push(i);
        }
        let sequence = &mut *share.sequence;
        let mirror = sequence.mirror.as_mut().expect("a sequence of a model on a device has a mirror");
        let tended = &mut sequence.attention;
        steps.push(Step { cache: &mut sequence.cache, mirror, token: share.tokens[t], is_wanted, tended });
    }
    let logits = device.step(&mut steps, pool)?;
    let vocab = logits.len() / wanted.len().max(1);
    wanted.iter().zip(logits.chunks_exact(vocab.max(1))).for_each(|(i, logits)| each(*i, t, logits));
    Ok(())
}

fn prompt(
    device: &mut OnDevice,
    share: &mut Share,
    pool: &Pool,
    done: &mut dyn FnMut(usize),
    each: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), ForwardError> {
    let first_wanted = share.first_wanted();
    let sequence = &mut *share.sequence;
    let mirror = sequence.mirror.as_mut().expect("a sequence of a model on a device has a mirror");
    let prompt = Prompt { cache: &mut sequence.cache, mirror, tokens: share.tokens, first_wanted };
    // What compresses the prompt is `finish_prompt`, all layers together.
    device.prompt(prompt, pool, done, each)
}
