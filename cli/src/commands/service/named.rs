//! What the flags of services name: ports, networks, secrets and configs.

use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::values::{add_pairs, fields, push};

pub(super) fn publish(text: &str) -> anyhow::Result<Value> {
    let wrong =
        || anyhow::anyhow!("publish {text:?} cannot be read: write 8080:80, or target=80,published=8080,mode=host");
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    if !text.contains('=') {
        // The short form publishes through the routing mesh.
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (published, target) = ports.rsplit_once(':').unwrap_or(("0", ports));
        let mut port = json!({"Protocol": protocol, "TargetPort": number(target)?, "PublishMode": "ingress"});
        set_published(&mut port, published).ok_or_else(wrong)?;
        return Ok(port);
    }
    let fields = fields(text);
    let target = number(fields.get("target").ok_or_else(wrong)?)?;
    let mut port = json!({
        "Protocol": fields.get("protocol").unwrap_or(&"tcp"), "TargetPort": target,
        "PublishMode": fields.get("mode").unwrap_or(&"ingress"),
    });
    set_published(&mut port, fields.get("published").unwrap_or(&"0")).ok_or_else(wrong)?;
    Ok(port)
}

/// Reads `8080` or `127.0.0.1:8080`.
fn set_published(port: &mut Value, text: &str) -> Option<()> {
    let number = match text.rsplit_once(':') {
        Some((address, number)) => {
            port["HostIP"] = json!(address.parse::<std::net::Ipv4Addr>().ok()?);
            number
        }
        None => text,
    };
    port["PublishedPort"] = json!(number.parse::<u16>().ok()?);
    Some(())
}

/// A network by its name; the daemon knows ids.
pub(super) async fn attachment(client: &Client, text: &str) -> anyhow::Result<Value> {
    let mut network = json!({});
    let mut name = text;
    if text.contains('=') {
        name = "";
        for (key, value) in text.split(',').filter_map(|part| part.split_once('=')) {
            match key {
                "name" => name = value,
                "alias" => push(&mut network["Aliases"], json!(value)),
                "driver-opt" => add_pairs(&mut network["DriverOpts"], &[value.to_owned()]),
                other => anyhow::bail!("network {text:?}: {other:?} is not known; use name, alias or driver-opt"),
            }
        }
        anyhow::ensure!(!name.is_empty(), "network {text:?} names none: write name=NETWORK,alias=NAME");
    }
    let found = client.get(&format!("/networks/{}?scope=swarm", crate::client::escape(name))).await?;
    network["Target"] = found["Id"].clone();
    Ok(network)
}

/// A reference to a secret or config by its name; the daemon knows ids alone.
pub(super) async fn reference(client: &Client, flag: &str, kind: &str, text: &str) -> anyhow::Result<Value> {
    let fields = if text.contains('=') { fields(text) } else { [("source", text)].into() };
    let first = |names: &[&str]| names.iter().find_map(|name| fields.get(name)).copied();
    let name = first(&["source", "src"]).ok_or_else(|| anyhow::anyhow!("{flag} {text:?} names no source"))?;
    let found = client.get(&format!("/{kind}/{name}")).await?;
    let default_target = if flag == "config" { format!("/{name}") } else { name.to_owned() };
    let target = first(&["target", "dst", "destination"]).map_or(default_target, str::to_owned);
    let mode = u32::from_str_radix(first(&["mode"]).unwrap_or("0444"), 8)
        .map_err(|_| anyhow::anyhow!("{flag} {text:?}: mode is an octal number such as 0400"))?;
    let file = json!({
        "Name": target, "UID": first(&["uid"]).unwrap_or("0"), "GID": first(&["gid"]).unwrap_or("0"), "Mode": mode,
    });
    Ok(if flag == "secret" {
        json!({"File": file, "SecretID": found["ID"], "SecretName": name})
    } else {
        json!({"File": file, "ConfigID": found["ID"], "ConfigName": name})
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        assert_eq!(publish("mode=host,target=80,published=8080").unwrap()["PublishMode"], "host");
        assert_eq!(publish("8080:80/udp").unwrap()["Protocol"], "udp");
        let local = publish("127.0.0.1:8080:80").unwrap();
        assert_eq!((local["HostIP"].as_str(), local["PublishedPort"].as_u64()), (Some("127.0.0.1"), Some(8080)));
        assert_eq!(publish("target=80,published=127.0.0.1:8080").unwrap()["HostIP"], "127.0.0.1");
        for wrong in ["web", "x:80", "1.2.3:80:80", "published=80"] {
            assert!(publish(wrong).is_err(), "{wrong}");
        }
    }
}
