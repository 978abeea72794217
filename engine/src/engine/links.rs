//! Links of the default network: a container finds others there by its own /etc/hosts and environment, as that
//! network serves no names.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use super::{Container, Engine, EngineError, disk_error};
use crate::container::config::{ContainerConfig, Link, NetworkMode};
use crate::network::DEFAULT_NETWORK;

/// What every container has, and so says nothing of a linked one.
const OWN_VARIABLES: [&str; 2] = ["HOME", "PATH"];

/// Another container as it is seen by a link.
struct Linked {
    alias: String,
    address: Ipv4Addr,
    config: Arc<ContainerConfig>,
}

impl Linked {
    /// The line for /etc/hosts.
    fn host(&self) -> String {
        let mut names = vec![self.alias.as_str()];
        for name in [&self.config.hostname, &self.config.name] {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        format!("{}\t{}", self.address, names.join(" "))
    }

    /// What the environment of `owner` says of it.
    fn environment(&self, owner: &str) -> Vec<String> {
        let prefix = self.alias.replace('-', "_").to_ascii_uppercase();
        let mut ports: Vec<(u16, &str)> = self
            .config
            .exposed_ports
            .iter()
            .filter_map(|port| {
                let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
                Some((number.parse().ok()?, protocol))
            })
            .collect();
        ports.sort_unstable();
        let mut env = vec![format!("{prefix}_NAME=/{owner}/{}", self.alias)];
        let url = |(port, protocol): (u16, &str)| format!("{protocol}://{}:{port}", self.address);
        env.extend(ports.first().map(|&first| format!("{prefix}_PORT={}", url(first))));
        for &(port, protocol) in &ports {
            let name = format!("{prefix}_PORT_{port}_{}", protocol.to_ascii_uppercase());
            env.extend([
                format!("{name}={}", url((port, protocol))),
                format!("{name}_ADDR={}", self.address),
                format!("{name}_PORT={port}"),
                format!("{name}_PROTO={protocol}"),
            ]);
        }
        let told = self.config.env.iter().filter_map(|var| var.split_once('='));
        env.extend(
            told.filter(|(name, _)| !OWN_VARIABLES.contains(name))
                .map(|(name, value)| format!("{prefix}_ENV_{name}={value}")),
        );
        env
    }
}

/// Takes `NAME[:ALIAS]` apart; also as a link is told of, `/NAME:/OWNER/ALIAS`.
pub fn link_parts(text: &str) -> Result<(&str, &str), EngineError> {
    let (name, alias) = text.split_once(':').unwrap_or((text, text));
    let (name, alias) = (name.trim_start_matches('/'), alias.rsplit('/').next().unwrap_or(alias));
    if name.is_empty() || alias.is_empty() || alias.contains(char::is_whitespace) {
        return Err(EngineError::Invalid(format!("bad format for links: {text:?}: write NAME:ALIAS")));
    }
    Ok((name, alias))
}

/// How often a network may be handed on from container to container.
const SHARED_MAX: usize = 16;

impl Engine {
    /// Reads `NAME[:ALIAS]`, and finds the container.
    pub fn link(&self, text: &str) -> Result<Link, EngineError> {
        let (name, alias) = link_parts(text)?;
        let target = self
            .owner_of_network(name)
            .map_err(|error| EngineError::Invalid(format!("could not get container for {name}: {error}")))?;
        if target.config().network == NetworkMode::Host {
            return Err(EngineError::Invalid(
                "conflicting options: host type networking can't be used with links. This would result in undefined \
                 behavior: reach the container at the host's own addresses"
                    .into(),
            ));
        }
        Ok(Link { container: target.id.clone(), alias: alias.to_owned() })
    }

    /// A container, or if that is in another's network, the one whose it is.
    pub(super) fn owner_of_network(&self, name: &str) -> Result<Arc<Container>, EngineError> {
        let mut owner = self.find(name)?;
        for _ in 0..SHARED_MAX {
            let NetworkMode::Container(id) = owner.config().network.clone() else { break };
            owner = self.find(&id)?;
        }
        Ok(owner)
    }

    /// Those that a container that is to start is linked to; all of them must run.
    fn linked(&self, config: &ContainerConfig) -> io::Result<Vec<Linked>> {
        let linked = |link: &Link| {
            let target = self.find(&link.container).map_err(io::Error::other)?;
            let address = target.address_in(DEFAULT_NETWORK).ok_or_else(|| {
                io::Error::other(format!(
                    "Cannot link to a non running container: /{} AS /{}/{}; start that one first",
                    target.name(),
                    config.name,
                    link.alias
                ))
            })?;
            Ok(Linked { alias: link.alias.clone(), address, config: target.config() })
        };
        config.links.iter().map(linked).collect()
    }

    /// The configuration with what its links come to, for as long as the container runs.
    pub(super) fn with_links(&self, config: Arc<ContainerConfig>) -> io::Result<Arc<ContainerConfig>> {
        if config.links.is_empty() {
            return Ok(config);
        }
        let linked = self.linked(&config)?;
        let mut whole = (*config).clone();
        whole.hosts.extend(linked.iter().map(Linked::host));
        // What the container itself is given wins.
        let told = linked.iter().flat_map(|linked| linked.environment(&config.name));
        whole.env = told.chain(whole.env).collect();
        Ok(Arc::new(whole))
    }

    /// Has those find a container that has started who are linked to it and run.
    pub(super) fn refresh_links(&self, target: &Container) {
        let Some(address) = target.address_in(DEFAULT_NETWORK) else { return };
        let others: Vec<_> = self.lock().values().cloned().collect();
        for other in others.iter().filter(|other| other.require_running().is_ok()) {
            let config = other.config();
            let aliases: Vec<_> = config.links.iter().filter(|link| link.container == target.id).collect();
            if aliases.is_empty() {
                continue;
            }
            let path = other.dirs.data.join("hosts");
            let renewed = fs::read_to_string(&path).and_then(|text| {
                let renew = |line: &str| match line.split_once('\t') {
                    Some((_, names)) if aliases.iter().any(|link| names.split(' ').next() == Some(&link.alias)) => {
                        format!("{address}\t{names}\n")
                    }
                    _ => format!("{line}\n"),
                };
                fs::write(&path, text.lines().map(renew).collect::<String>())
            });
            if let Err(error) = renewed {
                tracing::warn!(container = %other.id, %error, "a container does not find one that it is linked to");
            }
        }
    }

    /// What containers are called by those that are linked to them, by their ids: `OWNER/ALIAS`.
    #[must_use]
    pub fn link_names(&self) -> BTreeMap<String, Vec<String>> {
        let mut names = BTreeMap::<_, Vec<_>>::new();
        for owner in self.lock().values() {
            let config = owner.config();
            for link in &config.links {
                names.entry(link.container.clone()).or_default().push(format!("{}/{}", config.name, link.alias));
            }
        }
        names
    }

    /// Takes a link away: `OWNER/ALIAS`. What runs keeps what it knows.
    pub fn remove_link(&self, name: &str) -> Result<(), EngineError> {
        let gone = || EngineError::NoContainer(format!("{name}: a link is named as OWNER/ALIAS"));
        let (owner, alias) = name.trim_start_matches('/').split_once('/').ok_or_else(gone)?;
        let owner = self.find(owner)?;
        if !owner.config().links.iter().any(|link| link.alias == alias) {
            return Err(gone());
        }
        owner
            .change(|config| config.links.retain(|link| link.alias != alias))
            .map_err(|error| disk_error(format!("saving container {}", owner.id))(io::Error::other(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read_as_written_and_as_told_of() {
        for (text, parts) in [("db", ("db", "db")), ("db:store", ("db", "store")), ("/db:/app/store", ("db", "store"))]
        {
            assert_eq!(link_parts(text).ok(), Some(parts));
        }
        for text in ["", ":store", "db:", "db:/app/", "db:a\n10.0.0.1 b"] {
            assert!(link_parts(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_linked_container_is_told_of_as_docker_does() {
        let config = ContainerConfig {
            name: "db".into(),
            hostname: "abc".into(),
            exposed_ports: vec!["5432/tcp".into(), "53/udp".into()],
            env: vec!["PATH=/bin".into(), "USER=bee".into()],
            ..ContainerConfig::default()
        };
        let linked = Linked { alias: "my-db".into(), address: Ipv4Addr::new(172, 17, 0, 2), config: Arc::new(config) };
        assert_eq!(linked.host(), "172.17.0.2\tmy-db abc db");
        let env = linked.environment("web");
        for want in [
            "MY_DB_NAME=/web/my-db",
            "MY_DB_PORT=udp://172.17.0.2:53",
            "MY_DB_PORT_5432_TCP=tcp://172.17.0.2:5432",
            "MY_DB_PORT_5432_TCP_ADDR=172.17.0.2",
            "MY_DB_PORT_53_UDP_PROTO=udp",
            "MY_DB_ENV_USER=bee",
        ] {
            assert!(env.iter().any(|var| var == want), "{want} is not in {env:?}");
        }
        assert!(!env.iter().any(|var| var.contains("/bin")));
    }
}
