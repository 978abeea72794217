//! Networks that are not this host's alone: what the engine and whoever keeps them say to each other.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use skep_api::Subnet;
use skep_name_server::Zone;

use super::{Endpoint, WantedPlace};
use crate::container::config::PublishedPort;

/// Keeps networks that are not this host's alone; the engine hands it the containers that join them.
pub trait NetworkKeeper: std::fmt::Debug + Send + Sync + 'static {
    /// Asks for a place that nobody has planned; it is the container's until it leaves.
    fn ask<'a>(&'a self, container: &'a str, wanted: &'a WantedPlace, names: Vec<String>) -> KeeperReply<'a, Endpoint>;
    /// Gives a container its places, or those of them that it has not yet; returns what the host's ports
    /// for it are to lead through.
    fn join<'a>(&'a self, container: &'a str, joining: Joining) -> KeeperReply<'a, Ipv4Addr>;
    /// Takes up a container that has its places from before the daemon's restart.
    fn adopt(&self, container: &str, joining: Joining);
    /// What is known of a network.
    fn network(&self, id: &str) -> Option<KeptNetwork>;
    /// Hears of the names in the other networks of a container.
    fn tell_names(&self, container: &str, neighbours: Zone);
    /// Takes a running container out of one network.
    fn part<'a>(&'a self, container: &'a str, network: &'a str) -> KeeperReply<'a, ()>;
    /// Takes a container out of all; one that is in none is no error.
    fn leave<'a>(&'a self, container: &'a str) -> KeeperReply<'a, ()>;
}

/// What a [`NetworkKeeper`] promises.
pub type KeeperReply<'a, T> = std::pin::Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// A network that is not this host's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptNetwork {
    pub name: String,
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
    pub v6: Option<skep_api::Ipv6Side>,
    /// Nothing gets out of it.
    pub internal: bool,
}

/// A container that joins networks.
#[derive(Clone, Debug)]
pub struct Joining {
    pub netns: PathBuf,
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<PublishedPort>,
    /// Whom to ask for names of others; empty: as the host does.
    pub resolvers: Vec<String>,
    /// Whether no network of the host's lets its packets out.
    pub leads_out: bool,
    /// The names in its networks of the host's.
    pub neighbours: Zone,
}

/// What is known of a place in a network that is not this host's alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its keeper's name for it.
    pub id: String,
    pub network_name: String,
    pub prefix_len: u8,
    /// None: nothing gets out of the network.
    pub gateway: Option<Ipv4Addr>,
}
