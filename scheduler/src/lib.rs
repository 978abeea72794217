//! Places tasks on nodes: (cluster view, pending tasks) → placements, and for each refusal its
//! reason.
//!
//! Pure: no clock, no I/O, no randomness, nothing async; the same input gives the same plan. A node
//! must pass every filter; among those that do, a task goes where the fewest tasks of its service
//! are, then the fewest tasks at all. A decision is never revisited.
//!
//! Placing n tasks of a service looks at about n nodes, not at all of them: nodes are kept in the
//! order of their load, and those that run the service already are known.

mod filter;
mod place;
mod spread;
mod view;
mod volumes;

pub use filter::Obstacle;
pub use place::{Group, Plan, Refusal, check_node, place};
pub use view::{ClusterView, Occupant};
