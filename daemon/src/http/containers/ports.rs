//! The ports of single containers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use skep_api::service::Protocol;
use skep_engine::PublishedPort;

use crate::http::ApiError;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct PortBinding {
    host_ip: String,
    host_port: String,
}

/// Reads `80/tcp`.
fn parse_port(key: &str) -> Result<(u16, Protocol), ApiError> {
    let wrong = || ApiError::bad_request(format!("invalid port specification: {key:?}: write 80/tcp"));
    let (number, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
    let number = number.parse().map_err(|_| wrong())?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return Err(wrong()),
    };
    Ok((number, protocol))
}

/// The ports that a request publishes, on the `usual` address unless another is named.
pub(super) fn published(
    bindings: &BTreeMap<String, Vec<PortBinding>>,
    usual: Option<IpAddr>,
) -> Result<Vec<PublishedPort>, ApiError> {
    let mut ports: Vec<PublishedPort> = Vec::new();
    for (key, bindings) in bindings {
        let (container_port, protocol) = parse_port(key)?;
        for PortBinding { host_ip, host_port } in bindings {
            let host_ip = match host_ip.trim_start_matches('[').trim_end_matches(']') {
                "" => usual,
                address => Some(address.parse().map_err(|_| {
                    ApiError::bad_request(format!("invalid IP address {address:?}: name one of this host's"))
                })?),
            };
            let (host_port, host_port_last) = host_ports(host_port)?;
            let port = PublishedPort { protocol, container_port, host_ip, host_port, host_port_last };
            if !ports.contains(&port) || host_port == 0 {
                ports.push(port);
            }
        }
    }
    Ok(ports)
}

/// One port, or none for any; or a range, any of which will do: its first and its last.
fn host_ports(text: &str) -> Result<(u16, u16), ApiError> {
    let wrong = || ApiError::bad_request(format!("invalid port specification: {text:?}: use 1 to 65535"));
    if text.is_empty() {
        return Ok((0, 0));
    }
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    match text.split_once('-') {
        None => Ok((number(text)?, 0)),
        Some((first, last)) if number(first)? <= number(last)? => Ok((number(first)?, number(last)?)),
        Some(_) => Err(wrong()),
    }
}

/// Any port of the host's for each that is exposed and not published yet.
pub(super) fn exposed<'a>(
    all: impl Iterator<Item = &'a String>,
    published: &[PublishedPort],
    host_ip: Option<IpAddr>,
) -> Result<Vec<PublishedPort>, ApiError> {
    let mut more: Vec<PublishedPort> = Vec::new();
    for key in all {
        let (container_port, protocol) = parse_port(key)?;
        let has = |ports: &[PublishedPort]| {
            ports.iter().any(|port| port.container_port == container_port && port.protocol == protocol)
        };
        if !has(published) && !has(&more) {
            more.push(PublishedPort { protocol, container_port, host_ip, host_port: 0, host_port_last: 0 });
        }
    }
    Ok(more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, want: &str) {
        let got = match published(&serde_json::from_str(json).unwrap(), None) {
            Ok(ports) => {
                let text = |p: &PublishedPort| {
                    let last = if p.host_port_last == 0 { String::new() } else { format!("-{}", p.host_port_last) };
                    let at = p.host_ip.map_or_else(|| "*".to_owned(), |address| address.to_string());
                    format!("{at}:{}{last}:{}/{}", p.host_port, p.container_port, p.protocol.as_str())
                };
                ports.iter().map(text).collect::<Vec<_>>().join(" ")
            }
            Err(error) => format!("{error:?}"),
        };
        assert!(got.contains(want), "{got} should say {want}");
    }

    #[test]
    fn bindings_are_read_and_addresses_obeyed() {
        check(r#"{"80/tcp":[{"HostPort":"8080"}]}"#, "*:8080:80/tcp");
        check(r#"{"80":[{"HostIp":"127.0.0.1","HostPort":"8080"}]}"#, "127.0.0.1:8080:80/tcp");
        check(r#"{"53/udp":[{}]}"#, "*:0:53/udp");
        check(
            r#"{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"1"},{"HostIp":"::","HostPort":"1"}]}"#,
            "0.0.0.0:1:80/tcp :::1:80/tcp",
        );
        check(r#"{"80/tcp":[{"HostPort":"many"}]}"#, "many");
        check(r#"{"80/tcp":[{"HostPort":"8000-8010"}]}"#, "*:8000-8010:80/tcp");
        check(r#"{"80/tcp":[{"HostPort":"8010-8000"}]}"#, "invalid port");
        check(r#"{"80/icmp":[]}"#, "80/icmp");
        check(r#"{"80/tcp":[{"HostIp":"[::1]","HostPort":"1"}]}"#, "::1:1:80/tcp");
        check(r#"{"80/tcp":[{"HostIp":"here"}]}"#, "here");
    }
}
