//! The client's commands.

pub(crate) mod audit;
pub(crate) mod build;
pub(crate) mod container;
pub(crate) mod context;
pub(crate) mod files;
pub(crate) mod image;
pub(crate) mod inspect;
pub(crate) mod network;
pub(crate) mod node;
pub(crate) mod payload;
pub(crate) mod plugin;
pub(crate) mod prune;
pub(crate) mod run;
pub(crate) mod service;
pub(crate) mod stack;
pub(crate) mod stats;
pub(crate) mod swarm;
pub(crate) mod system;
pub(crate) mod values;
pub(crate) mod volume;
