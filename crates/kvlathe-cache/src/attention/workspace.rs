//! Buffers that a thread keeps from task to task.

use std::cell::RefCell;

use kvlathe_codec::{Lines, RotationWalk, Scratch};

/// What the buffers are called when there is no memory for them.
pub(super) const BUFFERS: &str = "attention's buffers";

/// What one tile adds.
#[derive(Default)]
pub(super) struct TileSums {
    /// `[queries]`: the factor on what was summed before.
    pub(super) rescale: Lines<f32>,
    /// `[queries, value_dim]`.
    pub(super) added: Lines<f32>,
}

#[derive(Default)]
pub(super) struct Workspace {
    pub(super) scratch: Scratch,
    /// From block to block of one part.
    pub(super) walk: Option<RotationWalk>,
    /// `[queries, tokens]` of one part.
    pub(super) scores: Lines<f32>,
    /// Exact keys or values that are not float32 already.
    pub(super) wide: Lines<f32>,
    pub(super) sums: TileSums,
    /// Keys of a tile, component-major, and its values, token-major.
    pub(super) tile_keys: Lines<f32>,
    pub(super) tile_values: Lines<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Runs one task with this thread's buffers.
pub(super) fn with_workspace<R>(task: impl FnOnce(&mut Workspace) -> R) -> R {
    WORKSPACE.with_borrow_mut(task)
}
