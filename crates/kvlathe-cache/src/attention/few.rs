//! Attention of few queries: runs of packed blocks and the exact tokens of each head are parts that threads work on.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use kvlathe_codec::{Element, Queries, memory};

use super::head::BlockRun;
use super::partial::Partial;
use super::{Call, Output};
use crate::error::{CacheError, Result};
use crate::threads::for_each_task;
use crate::workspace::with_workspace;

/// Of a thread's share of the packed blocks, the largest and the smallest part: threads begin with large ones, for few
/// starts, and end with small ones, so that none waits long for another (guided self-scheduling: Polychronopoulos and
/// Kuck, 1987).
const LARGEST_PART: usize = 2;
const SMALLEST_PART: usize = 16;
/// Fewest packed tokens of a part: enough to make it worth its start.
const MIN_PART_TOKENS: usize = 256;

/// What a step leaves allocated for the next; there may be more of each than one call needs.
#[derive(Default)]
pub(super) struct Buffers {
    runs: Vec<BlockRun>,
    /// One a head.
    queries: Vec<Queries>,
    /// `[runs and one for the exact tokens, heads]`. Each is locked once, by the thread that has its part.
    partials: Vec<Mutex<Partial>>,
}

/// Cuts a head's `n_blocks` into runs that get shorter, the same for all of `n_heads` heads, each of at least `least`
/// blocks but for the last; into one where there is one thread.
fn runs(
    n_blocks: usize,
    n_heads: usize,
    n_threads: usize,
    least: usize,
) -> impl Iterator<Item = Range<usize>> {
    let share = (n_blocks * n_heads).div_ceil(n_threads);
    let least = least.max(share / SMALLEST_PART);
    let most = if n_threads == 1 { n_blocks } else { least.max(share / LARGEST_PART) };
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = n_blocks - first;
        // Half of what is left, unless that would leave a part too small.
        let len = if n_threads == 1 || left < 2 * least { left } else { (left / 2).clamp(least, most) };
        first += len;
        (len > 0).then_some(first - len..first)
    })
}

/// As [`crate::LayerCache::attend`].
pub(super) fn attend<E: Element>(
    call: &Call<'_, E>,
    buffers: &mut Buffers,
    to: &mut Output<'_, E>,
    n_threads: usize,
) -> Result<()> {
    let Buffers { runs: all_runs, queries, partials } = buffers;
    let (n_heads, block_len) = (call.n_heads(), call.keys.block_len());
    let keys = call.layer.sides(0).0;
    // Blocks of which a query sees something.
    let n_unseen = (call.first_seen.saturating_sub(keys.blocks_at()) / block_len).min(keys.blocks().len());
    let n_blocks = keys.blocks().len() - n_unseen;
    let mut n_runs = 0;
    for seen in runs(n_blocks, n_heads, n_threads, MIN_PART_TOKENS.div_ceil(block_len)) {
        let blocks = n_unseen + seen.start..n_unseen + seen.end;
        memory::grow(all_runs, n_runs + 1, BlockRun::default, "parts of attention")?;
        let run = &mut all_runs[n_runs];
        call.keys.walk_from(keys.blocks_at() + blocks.start * block_len, &mut run.walk);
        run.blocks = blocks;
        n_runs += 1;
    }
    let (runs, n_parts) = (&all_runs[..n_runs], n_runs + 1);
    if n_runs > 0 {
        memory::grow(queries, n_heads, Queries::default, "queries of all heads")?;
        for (at, queries) in queries[..n_heads].iter_mut().enumerate() {
            queries.prepare(call.head(at).key_stream(), call.queries_of(at))?;
        }
    }
    memory::grow(partials, n_parts * n_heads, Mutex::default, "parts of attention")?;
    let partials = &mut partials[..n_parts * n_heads];

    let failure: Mutex<Option<CacheError>> = Mutex::new(None);
    for_each_task(n_threads, partials.len(), &|task| {
        // Large parts of all heads come first.
        let (at, part) = (task % n_heads, task / n_heads);
        let (head, mut partial) = (call.head(at), locked(&partials[task]));
        let done = with_workspace(|workspace| match runs.get(part) {
            Some(run) => head.blocks(run, &queries[at], &mut partial, workspace),
            None => head.exact(&mut partial, workspace),
        });
        if let Err(error) = done {
            *locked(&failure) = Some(error);
        }
    });
    if let Some(error) = locked(&failure).take() {
        return Err(error);
    }

    let (totals, others) = partials.split_at_mut(n_heads);
    for (at, total) in totals.iter_mut().enumerate() {
        let total = total.get_mut().unwrap_or_else(PoisonError::into_inner);
        for parts in others.chunks_exact(n_heads) {
            total.merge(call.head(at).value_stream(), &locked(&parts[at]))?;
        }
        call.write(at, 0, total, to)?;
    }
    Ok(())
}

/// What a panic has left is cleared before it is used again.
fn locked<T>(slot: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_cover_all_blocks_and_get_shorter() {
        for (n_heads, n_threads) in [(1, 1), (2, 2), (8, 2), (2, 16), (3, 5)] {
            for n_blocks in [0, 1, 7, 8, 31, 256, 2048] {
                let runs: Vec<_> = runs(n_blocks, n_heads, n_threads, 4).collect();
                assert_eq!(
                    runs.iter().cloned().flatten().collect::<Vec<_>>(),
                    (0..n_blocks).collect::<Vec<_>>()
                );
                let whole = &runs[..runs.len().saturating_sub(1)];
                assert!(whole.windows(2).all(|pair| pair[0].len() >= pair[1].len()), "{runs:?}");
                assert!(whole.iter().all(|run| run.len() >= 4), "{runs:?}");
                if n_threads == 1 {
                    assert!(runs.len() <= 1, "no thread to share with: {runs:?}");
                } else if let Some(last) = runs.last().filter(|_| n_blocks * n_heads > 64 * n_threads) {
                    let share = n_blocks * n_heads / n_threads;
                    assert!(last.len() <= share / 4, "the end is shared out in small parts: {runs:?}");
                }
            }
        }
    }
}
