//! The replicated store of a swarm: what the managers agree on.
//!
//! A write is a [`Transaction`]: it is validated against the versions its author read, replicated
//! by Raft (openraft), made durable on sled, encrypted, and applied to [`Tables`] in the same order
//! on every manager. A read takes a [`Tables`] value, which never changes under the reader and
//! costs nothing to take. Changes are told to watchers as [`Commit`]s.
//!
//! It never reads a clock (the author of a transaction writes the time into it), never looks at
//! what an object means beyond its indexes, and never answers from data it could not verify.

mod seal;
mod watermark;

pub mod tables;
pub mod transaction;

mod activity;
mod log;
mod machine;
mod raft_types;

pub mod peers;
mod rpc;
mod store;

pub use activity::ActivityCounts;
pub use peers::{OtherMember, PeerError, Peers, RpcKind};
pub use raft_types::RaftId;
pub use rpc::SnapshotHeader;
pub use seal::{DataKey, DataKeyError};
pub use store::{Leadership, OpenError, ProposeError, Store, StoreConfig, UpdateError};
pub use tables::{Table, Tables};
pub use transaction::{Action, Change, Commit, Refusal, Transaction};
