//! The daemon of a host: reads its configuration, opens the engine, takes its place in a swarm,
//! and serves the Engine API.

mod bulk;
mod config;
mod daemon;
mod filters;
mod http;
mod logs;
mod metrics;
mod swarm;

pub use config::{ConfigError, DaemonArgs, DaemonConfig};
pub use daemon::{VERSION, run};
