//! The swarm: inspect, init, join, leave, update.

use std::net::Ipv4Addr;
use std::time::Duration;

use axum::Json;
use axum::extract::Query;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::{Availability, Cluster, ClusterSpec, SecretBytes};
use skep_manager::control::Command;
use skep_pki::IssuerInfo;

use super::{
    ApiError, State,
    json::{JsonBody, parse},
};
use crate::swarm::{InitRequest, JoinRequest};

pub(super) fn cluster_json(cluster: &Cluster) -> Value {
    let issuer = IssuerInfo::of_pem(&cluster.signing_root().certificate_pem).ok();
    let issuer = issuer.map(|issuer| (issuer.subject, issuer.public_key)).unwrap_or_default();
    let mut value = json!({
        "ID": cluster.id, "Spec": cluster.spec, "RootRotationInProgress": cluster.next_root.is_some(),
        "TLSInfo": {
            "TrustRoot": cluster.root_ca.certificate_pem, "CertIssuerSubject": issuer.0, "CertIssuerPublicKey": issuer.1,
        },
        "DataPathPort": cluster.data_path_port, "DefaultAddrPool": cluster.default_addr_pool,
        "SubnetSize": cluster.subnet_size,
    });
    if let (Value::Object(value), Ok(Value::Object(meta))) = (&mut value, serde_json::to_value(cluster.meta)) {
        value.extend(meta);
    }
    value
}

pub(super) async fn inspect(state: State) -> Result<Json<Value>, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    let cluster = tables.cluster().ok_or_else(|| ApiError::not_found("the swarm is not there yet"))?;
    let mut value = cluster_json(cluster);
    let text = |secret: &SecretBytes| String::from_utf8_lossy(secret.expose()).into_owned();
    value["JoinTokens"] =
        json!({"Worker": text(&cluster.join_tokens.worker), "Manager": text(&cluster.join_tokens.manager)});
    Ok(Json(value))
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct InitBody {
    listen_addr: String,
    advertise_addr: String,
    data_path_addr: String,
    data_path_port: u16,
    default_addr_pool: Vec<String>,
    subnet_size: u8,
    force_new_cluster: bool,
    spec: ClusterSpec,
    #[serde(rename = "AutoLockManagers")]
    auto_lock_managers: bool,
    availability: Availability,
}

fn refuse_external_ca(spec: &Value) -> Result<(), ApiError> {
    let named = spec.pointer("/CAConfig/ExternalCAs").and_then(Value::as_array);
    if named.is_none_or(Vec::is_empty) {
        return Ok(());
    }
    Err(ApiError::unsupported(
        "an external CA is not supported: the swarm's managers sign, with a root of yours if you bring it ('swarm ca --rotate --ca-cert --ca-key')",
    ))
}

pub(super) async fn init(state: State, body: JsonBody) -> Result<Json<String>, ApiError> {
    let mut said = parse::<Value>(&body)?["Spec"].take();
    refuse_external_ca(&said)?;
    let mut body: InitBody = parse(&body)?;
    body.spec.encryption_config.auto_lock_managers |= body.auto_lock_managers;
    if body.spec.encryption_config.auto_lock_managers {
        merge(&mut said, &json!({"EncryptionConfig": {"AutoLockManagers": true}}));
    }
    // A swarm begins with a root of its own, from which the one that is brought takes over.
    let brings_root = !std::mem::take(&mut body.spec.ca.signing_ca_cert).is_empty();
    check_pools(&body.default_addr_pool, body.subnet_size)?;
    let request = InitRequest {
        listen: body.listen_addr,
        advertise: advertised(&state, body.advertise_addr),
        availability: body.availability,
        spec: body.spec,
        pools: body.default_addr_pool,
        subnet_size: body.subnet_size,
        data_path_addr: body.data_path_addr,
        data_path_port: body.data_path_port,
    };
    let is_new = !body.force_new_cluster;
    let made = if is_new { state.swarm.init(request).await? } else { state.swarm.recover(request).await? };
    if brings_root || !is_new {
        let settled = settle(&state, &said).await;
        if settled.is_err() && is_new {
            // The first error is the one to tell.
            let _ = state.swarm.leave(true).await;
        }
        settled?;
    }
    Ok(Json(made))
}

/// Sets what is said of a swarm that is there; what is not said stays.
async fn settle(state: &State, said: &Value) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let tables = manager.read().await?;
    let cluster = tables.cluster().ok_or_else(|| ApiError::internal("the swarm has no settings"))?;
    let before = serde_json::to_value(&cluster.spec).map_err(ApiError::internal)?;
    let mut spec = before.clone();
    merge(&mut spec, said);
    if spec == before {
        return Ok(());
    }
    let command = Command::UpdateCluster {
        version: cluster.meta.version,
        root_key: root_key(&spec),
        spec: serde_json::from_value(spec).map_err(ApiError::bad_request)?,
        rotate_worker_token: false,
        rotate_manager_token: false,
        rotate_unlock_key: false,
    };
    manager.execute(command).await?;
    // With one node another root is in force at once, and so are the tokens that name it.
    let in_force = async {
        let mut applied = manager.store().applied();
        while manager.view().cluster().is_some_and(|cluster| cluster.next_root.is_some()) {
            if applied.changed().await.is_err() {
                return;
            }
        }
    };
    // A node that is away holds it up, which 'swarm ca' shows.
    let _ = tokio::time::timeout(ROOT_LIMIT, in_force).await;
    Ok(())
}

/// How long a new swarm may take to trust the root that it is made with.
const ROOT_LIMIT: Duration = Duration::from_secs(5);

/// Puts in what is said: what is zero, empty or off is not.
fn merge(into: &mut Value, said: &Value) {
    match said {
        Value::Object(members) => {
            if !into.is_object() {
                *into = json!({});
            }
            for (name, value) in members {
                merge(&mut into[name], value);
            }
        }
        Value::Null | Value::Bool(false) => {}
        Value::String(text) if text.is_empty() => {}
        Value::Array(items) if items.is_empty() => {}
        Value::Number(number) if number.as_f64() == Some(0.0) => {}
        value => into.clone_from(value),
    }
}

/// The key of a root certificate that a spec brings.
fn root_key(spec: &Value) -> SecretBytes {
    let key = spec.pointer("/CAConfig/SigningCAKey").and_then(Value::as_str).unwrap_or_default();
    SecretBytes::new(key.as_bytes().to_vec())
}

/// What is said, or else the daemon's usual.
fn advertised(state: &State, said: String) -> String {
    if said.is_empty() { state.config.advertise_addr.clone() } else { said }
}

fn check_pools(pools: &[String], size: u8) -> Result<(), ApiError> {
    for pool in pools {
        let parsed = pool.split_once('/').and_then(|(addr, prefix)| {
            Some((addr.parse::<Ipv4Addr>().ok()?, prefix.parse::<u8>().ok().filter(|&prefix| prefix <= 32)?))
        });
        match parsed {
            None => {
                return Err(ApiError::bad_request(format!("address pool {pool:?} is no network such as 10.0.0.0/8")));
            }
            Some((_, prefix)) if size != 0 && !(prefix..=29).contains(&size) => {
                return Err(ApiError::bad_request(format!("subnets of /{size} do not fit into address pool {pool}")));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct JoinBody {
    listen_addr: String,
    advertise_addr: String,
    data_path_addr: String,
    remote_addrs: Vec<String>,
    join_token: String,
    availability: String,
}

pub(super) async fn join(state: State, body: JsonBody) -> Result<(), ApiError> {
    let body: JoinBody = parse(&body)?;
    if body.join_token.is_empty() {
        return Err(ApiError::bad_request(
            "join token is necessary to join a cluster: get it from 'swarm join-token' on a manager",
        ));
    }
    let request = JoinRequest {
        listen: body.listen_addr,
        advertise: advertised(&state, body.advertise_addr),
        data_path_addr: body.data_path_addr,
        availability: body.availability,
        token: body.join_token,
        managers: body.remote_addrs,
    };
    Ok(state.swarm.join(request).await?)
}

#[derive(Deserialize)]
pub(super) struct LeaveQuery {
    #[serde(default)]
    force: String,
}

/// Query switches as Docker's clients write them.
pub(super) fn is_on(text: &str) -> bool {
    matches!(text, "1" | "true" | "True" | "TRUE")
}

pub(super) async fn leave(state: State, Query(query): Query<LeaveQuery>) -> Result<(), ApiError> {
    Ok(state.swarm.leave(is_on(&query.force)).await?)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct UpdateQuery {
    version: u64,
    #[serde(default)]
    rotate_worker_token: String,
    #[serde(default)]
    rotate_manager_token: String,
    #[serde(default)]
    rotate_manager_unlock_key: String,
}

pub(super) async fn update(state: State, Query(query): Query<UpdateQuery>, body: JsonBody) -> Result<(), ApiError> {
    let said: Value = parse(&body)?;
    refuse_external_ca(&said)?;
    let root_key = root_key(&said);
    let spec: ClusterSpec = parse(&body)?;
    let command = Command::UpdateCluster {
        version: query.version,
        spec,
        rotate_worker_token: is_on(&query.rotate_worker_token),
        rotate_manager_token: is_on(&query.rotate_manager_token),
        rotate_unlock_key: is_on(&query.rotate_manager_unlock_key),
        root_key,
    };
    state.swarm.manager().await?.execute(command).await?;
    Ok(())
}

pub(super) async fn unlock_key(state: State) -> Result<Json<Value>, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    let key = tables.cluster().map(|cluster| String::from_utf8_lossy(cluster.unlock_key.expose()).into_owned());
    Ok(Json(json!({"UnlockKey": key.unwrap_or_default()})))
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct UnlockBody {
    unlock_key: String,
}

pub(super) async fn unlock(state: State, body: JsonBody) -> Result<(), ApiError> {
    Ok(state.swarm.unlock(&parse::<UnlockBody>(&body)?.unlock_key).await?)
}
