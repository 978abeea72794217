//! Docker's SDKs and Compose, unchanged: bollard for Rust, whose types are those of the Engine API, so that each answer is
//! read whole; Docker's own for Python; and the Compose that Debian has.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::HashMap;

use bollard::container::LogOutput;
use bollard::exec::{CreateExecOptions, StartExecOptions, StartExecResults};
use bollard::grpc::build::{ImageBuildFrontendOptions, ImageBuildLoadInput, NamedContext};
use bollard::grpc::driver::Build as _;
use bollard::grpc::driver::moby::Moby;
use bollard::models::{
    BuildInfoAux, ContainerCreateBody, EndpointSettings, HostConfig, NetworkConnectRequest, NetworkCreateRequest,
    PortBinding, SecretSpec, ServiceSpec, ServiceSpecMode, ServiceSpecModeReplicated, SwarmInitRequest, TaskSpec,
    TaskSpecContainerSpec, VolumeCreateRequest,
};
use bollard::query_parameters as query;
use bollard::{API_DEFAULT_VERSION, Docker, body_full};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use skep_chaos_tests::{Host, Rig, skip, take_turn};
use tokio::io::AsyncWriteExt as _;

const LIMIT_SECONDS: u64 = 30;

fn connect(host: &Host) -> Docker {
    Docker::connect_with_unix(&host.socket(), LIMIT_SECONDS, API_DEFAULT_VERSION).unwrap()
}

fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn words(line: &str) -> Option<Vec<String>> {
    Some(line.split(' ').map(str::to_owned).collect())
}

async fn text(output: impl Stream<Item = Result<LogOutput, bollard::errors::Error>>) -> String {
    let parts: Vec<_> = output.try_collect().await.unwrap();
    parts.iter().map(ToString::to_string).collect()
}

async fn make(docker: &Docker, name: &str, body: ContainerCreateBody) {
    let options = query::CreateContainerOptionsBuilder::default().name(name).build();
    docker.create_container(Some(options), body).await.unwrap();
}

/// An archive of one file.
fn archive(name: &str, content: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content.as_bytes()).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn containers_and_their_streams() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    within(async {
        let docker = connect(host).negotiate_version().await.unwrap();
        assert_eq!(docker.ping().await.unwrap(), "OK");
        assert!(docker.version().await.unwrap().api_version.is_some());
        assert_eq!(docker.info().await.unwrap().driver.as_deref(), Some("overlay2"));
        let body = ContainerCreateBody {
            image: Some("busybox".into()),
            cmd: Some(
                ["sh", "-c", "while read line; do echo heard $line; done; echo end >&2; exit 3"]
                    .map(str::to_owned)
                    .into(),
            ),
            open_stdin: Some(true),
            stdin_once: Some(true),
            labels: Some(HashMap::from([("kind".into(), "test".into())])),
            host_config: Some(HostConfig { memory: Some(64 << 20), ..HostConfig::default() }),
            ..ContainerCreateBody::default()
        };
        make(&docker, "ears", body).await;
        let attach = query::AttachContainerOptionsBuilder::default().stdin(true).stdout(true).stderr(true).stream(true);
        let mut attached = docker.attach_container("ears", Some(attach.build())).await.unwrap();
        docker.start_container("ears", None).await.unwrap();
        attached.input.write_all(b"one\ntwo\n").await.unwrap();
        attached.input.shutdown().await.unwrap();
        assert_eq!(text(attached.output).await, "heard one\nheard two\nend\n");
        let ended = docker.wait_container("ears", None).next().await.unwrap();
        assert!(matches!(ended, Err(bollard::errors::Error::DockerContainerWaitError { code: 3, .. })), "{ended:?}");
        let logs = query::LogsOptionsBuilder::default().stdout(true).stderr(true).tail("2").build();
        assert_eq!(text(docker.logs("ears", Some(logs))).await, "heard two\nend\n");
        let inspected = docker.inspect_container("ears", None).await.unwrap();
        assert_eq!(inspected.state.unwrap().exit_code, Some(3));
        assert_eq!(inspected.host_config.unwrap().memory, Some(64 << 20));
        let filters = HashMap::from([("label".to_owned(), vec!["kind=test".to_owned()])]);
        let list = query::ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        assert_eq!(docker.list_containers(Some(list)).await.unwrap().len(), 1);
        docker.remove_container("ears", None).await.unwrap();
    });
}

#[test]
fn execs_files_figures_and_events() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    within(async {
        let docker = connect(host);
        let body =
            ContainerCreateBody { image: Some("busybox".into()), cmd: words("sleep 1000"), ..Default::default() };
        make(&docker, "box", body).await;
        docker.start_container("box", None).await.unwrap();
        let options = CreateExecOptions {
            cmd: words("cat /etc/hostname"),
            attach_stdout: Some(true),
            ..CreateExecOptions::default()
        };
        let exec = docker.create_exec("box", options).await.unwrap().id;
        let StartExecResults::Attached { output, .. } =
            docker.start_exec(&exec, None::<StartExecOptions>).await.unwrap()
        else {
            panic!("it was asked to attach");
        };
        assert_eq!(text(output).await.trim().len(), 12);
        assert_eq!(docker.inspect_exec(&exec).await.unwrap().exit_code, Some(0));
        let into = query::UploadToContainerOptionsBuilder::default().path("/tmp").build();
        docker.upload_to_container("box", Some(into), body_full(archive("note", "noted").into())).await.unwrap();
        let from = query::DownloadFromContainerOptionsBuilder::default().path("/tmp/note").build();
        let bytes: Vec<_> = docker.download_from_container("box", Some(from)).try_collect().await.unwrap();
        assert!(String::from_utf8_lossy(&bytes.concat()).contains("noted"));
        assert_eq!(docker.container_changes("box").await.unwrap().unwrap().len(), 2);
        let top = docker.top_processes("box", None).await.unwrap();
        assert_eq!(top.processes.unwrap().len(), 1);
        let once = query::StatsOptionsBuilder::default().stream(false).build();
        let figures = docker.stats("box", Some(once)).next().await.unwrap().unwrap();
        assert!(figures.memory_stats.unwrap().usage.unwrap() > 0);
        docker.pause_container("box").await.unwrap();
        docker.unpause_container("box").await.unwrap();
        let rename = query::RenameContainerOptionsBuilder::default().name("other").build();
        docker.rename_container("box", rename).await.unwrap();
        let since = query::EventsOptionsBuilder::default().since("0").until(&now()).build();
        let events: Vec<_> = docker.events(Some(since)).try_collect().await.unwrap();
        let actions: Vec<_> = events.into_iter().filter_map(|event| event.action).collect();
        for action in ["create", "start", "pause", "unpause", "rename"] {
            assert!(actions.iter().any(|told| told == action), "{action}: {actions:?}");
        }
        let force = query::RemoveContainerOptionsBuilder::default().force(true).build();
        docker.remove_container("other", Some(force)).await.unwrap();
    });
}

fn now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    (since.as_secs() + 1).to_string()
}

#[test]
fn images_volumes_and_networks() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    within(async {
        let docker = connect(host);
        let context = archive("Dockerfile", "FROM busybox\nRUN echo built > /built\nCMD cat /built\n");
        let build = query::BuildImageOptionsBuilder::default().t("built:1").build();
        let told: Vec<_> =
            docker.build_image(build, None, Some(body_full(context.into()))).try_collect().await.unwrap();
        assert!(told.iter().any(|line| line.stream.as_ref().is_some_and(|text| text.contains("Successfully built"))));
        assert!(docker.inspect_image("built:1").await.unwrap().size.unwrap() > 0);
        assert!(!docker.image_history("built:1").await.unwrap().is_empty());
        let tag = query::TagImageOptionsBuilder::default().repo("other").tag("2").build();
        docker.tag_image("built:1", Some(tag)).await.unwrap();
        assert_eq!(docker.list_images(None::<query::ListImagesOptions>).await.unwrap().len(), 2);
        let saved: Vec<_> = docker.export_image("built:1").try_collect().await.unwrap();
        docker.remove_image("other:2", None::<query::RemoveImageOptions>, None).await.unwrap();
        docker.remove_image("built:1", None::<query::RemoveImageOptions>, None).await.unwrap();
        let load = query::ImportImageOptionsBuilder::default().build();
        let loaded: Vec<_> =
            docker.import_image(load, body_full(saved.concat().into()), None).try_collect().await.unwrap();
        assert!(!loaded.is_empty());
        assert!(docker.df(None).await.is_ok());

        docker.create_volume(VolumeCreateRequest { name: Some("kept".into()), ..Default::default() }).await.unwrap();
        assert_eq!(docker.inspect_volume("kept").await.unwrap().driver, "local");
        docker.create_network(NetworkCreateRequest { name: "back".into(), ..Default::default() }).await.unwrap();
        let binding = PortBinding { host_ip: None, host_port: Some("8080".into()) };
        let host_config = HostConfig {
            binds: Some(vec!["kept:/kept".into()]),
            port_bindings: Some(HashMap::from([("80/tcp".into(), Some(vec![binding]))])),
            ..HostConfig::default()
        };
        let body = ContainerCreateBody {
            image: Some("built:1".into()),
            cmd: words("sleep 1000"),
            host_config: Some(host_config),
            ..Default::default()
        };
        make(&docker, "web", body).await;
        docker.start_container("web", None).await.unwrap();
        let endpoint = EndpointSettings { aliases: Some(vec!["shop".into()]), ..Default::default() };
        let connect = NetworkConnectRequest { container: "web".into(), endpoint_config: Some(endpoint) };
        docker.connect_network("back", connect).await.unwrap();
        let settings = docker.inspect_container("web", None).await.unwrap().network_settings.unwrap();
        assert_eq!(settings.networks.unwrap().len(), 2);
        assert!(settings.ports.unwrap()["80/tcp"].is_some());
        assert_eq!(docker.inspect_network("back", None).await.unwrap().containers.unwrap().len(), 1);
        let force = query::RemoveContainerOptionsBuilder::default().force(true).build();
        docker.remove_container("web", Some(force)).await.unwrap();
        docker.remove_network("back").await.unwrap();
        docker.remove_volume("kept", None::<query::RemoveVolumeOptions>).await.unwrap();
        let missing = docker.inspect_container("web", None).await.unwrap_err();
        assert!(
            matches!(missing, bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }),
            "{missing}"
        );
    });
}

#[test]
fn a_swarm_and_its_services() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    within(async {
        let docker = connect(host);
        let init = SwarmInitRequest {
            advertise_addr: Some(host.addr().into()),
            listen_addr: Some("0.0.0.0:2377".into()),
            ..SwarmInitRequest::default()
        };
        docker.init_swarm(init).await.unwrap();
        assert!(docker.inspect_swarm().await.unwrap().join_tokens.is_some());
        assert_eq!(docker.list_nodes(None).await.unwrap().len(), 1);
        let secret = SecretSpec { name: Some("password".into()), data: Some("c2VzYW1l".into()), ..Default::default() };
        docker.create_secret(secret).await.unwrap();
        assert_eq!(docker.list_secrets(None).await.unwrap().len(), 1);
        let spec = |replicas| ServiceSpec {
            name: Some("web".into()),
            mode: Some(ServiceSpecMode {
                replicated: Some(ServiceSpecModeReplicated { replicas: Some(replicas) }),
                ..ServiceSpecMode::default()
            }),
            task_template: Some(TaskSpec {
                container_spec: Some(TaskSpecContainerSpec { image: Some("skep/whoami".into()), ..Default::default() }),
                ..TaskSpec::default()
            }),
            ..ServiceSpec::default()
        };
        docker.create_service(spec(1), None).await.unwrap();
        host.await_replicas("web", "1/1");
        let service = docker.inspect_service("web", None).await.unwrap();
        let version = i32::try_from(service.version.unwrap().index.unwrap()).unwrap();
        let options = query::UpdateServiceOptionsBuilder::default().version(version).build();
        docker.update_service("web", spec(3), options, None).await.unwrap();
        host.await_replicas("web", "3/3");
        assert_eq!(docker.list_tasks(None).await.unwrap().len(), 3);
        assert_eq!(docker.list_services(None).await.unwrap().len(), 1);
        docker.delete_service("web").await.unwrap();
        let force = query::LeaveSwarmOptionsBuilder::default().force(true).build();
        docker.leave_swarm(Some(force)).await.unwrap();
    });
}

#[test]
fn the_sdk_for_python_does_what_its_users_do() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    if !host.exec("/usr/bin/python3", &["-c", "import docker"]).success {
        return skip("this system's Python cannot load Docker's SDK (package python3-docker)");
    }
    host.start_daemon();
    host.import_busybox();
    // Debian's own: another Python's may be first in the path.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk.py");
    let ran = host.exec("/usr/bin/python3", &[script, &host.socket(), host.addr()]);
    assert!(ran.success, "{}\n{}\n{}", ran.stdout, ran.stderr, host.log());
}

#[test]
fn builds_go_by_buildkit_s_ways() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    within(async {
        let docker = connect(host);
        // As clients before 23 ask: over HTTP, with a session beside.
        let asked = |session: &str, dockerfile: &str| {
            let options = query::BuildImageOptionsBuilder::default()
                .dockerfile("Dockerfile")
                .t("asked:1")
                .version(query::BuilderVersion::BuilderBuildKit)
                .session(session)
                .build();
            let context = body_full(archive("Dockerfile", dockerfile).into());
            docker.build_image(options, None, Some(context)).try_collect::<Vec<_>>()
        };
        let told = asked("first", "FROM busybox\nRUN echo hello | tee /word\n").await.unwrap();
        let traces: Vec<_> = told
            .iter()
            .filter_map(|info| match &info.aux {
                Some(BuildInfoAux::BuildKit(trace)) => Some(trace),
                _ => None,
            })
            .collect();
        assert!(traces.iter().flat_map(|trace| &trace.logs).any(|log| log.msg == b"hello\n"), "{told:?}");
        let named = "naming to docker.io/library/asked:1";
        assert!(traces.iter().flat_map(|trace| &trace.statuses).any(|status| status.id == named), "{told:?}");
        let why = asked("second", "FROM busybox\nRUN exit 3\n").await.unwrap_err().to_string();
        assert!(why.contains("exit code: 3"), "{why}");
        // As buildx does it, but without going through the build by itself.
        let context = archive("Dockerfile", "FROM base\nCMD cat /word\n").into();
        let base = NamedContext { path: "docker-image://asked:1".into() };
        let frontend = ImageBuildFrontendOptions::builder().named_context("base", base).build();
        let driver = Moby::new(&docker);
        let built = driver.docker_build("driven:1", frontend, ImageBuildLoadInput::Upload(context), None, None).await;
        built.unwrap();
    });
    assert_eq!(host.ok(&["run", "--rm", "driven:1"]), "hello\n");
}

const PROJECT: &str = r#"
version: "3.8"
services:
  web:
    image: skep/whoami
    ports: ["8080:8000"]
    networks: [front, back]
    healthcheck: {test: ["CMD", "true"], interval: 1s}
  worker:
    build: {context: ., args: {WORD: built}}
    command: sh -c 'cat /word; echo $$FROM; touch /data/seen; exec sleep 1000'
    environment: {FROM: compose}
    volumes: ["data:/data"]
    networks: {back: {aliases: [helper]}}
    depends_on: [web]
networks:
  front: {}
  back: {internal: true}
volumes:
  data: {}
"#;

#[test]
fn a_project_of_compose_comes_up_and_down() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    if !host.exec("/usr/bin/docker-compose", &["version"]).success {
        return skip("this system's docker-compose does not run");
    }
    host.start_daemon();
    host.import_busybox();
    let project = host.dir().join("project");
    std::fs::create_dir(&project).unwrap();
    std::fs::write(project.join("docker-compose.yml"), PROJECT).unwrap();
    std::fs::write(project.join("Dockerfile"), "FROM busybox\nARG WORD\nRUN echo $WORD > /word\n").unwrap();
    let (directory, socket) = (project.display().to_string(), format!("DOCKER_HOST={}", host.socket()));
    let compose = |args: &[&str]| {
        let file = format!("{directory}/docker-compose.yml");
        let ran = host.exec("env", &[&[&socket, "/usr/bin/docker-compose", "-f", &file][..], args].concat());
        assert!(ran.success, "{args:?}: {}\n{}\n{}", ran.stdout, ran.stderr, host.log());
        ran.stdout
    };
    compose(&["up", "-d", "--build", "--scale", "worker=2"]);
    assert_eq!(host.running().len(), 3);
    assert!(host.curl("http://127.0.0.1:8080/").contains("Hostname:"));
    let logs = compose(&["logs", "--no-color", "worker"]);
    assert!(logs.matches("built").count() >= 2 && logs.contains("compose"), "{logs}");
    let found = compose(&["exec", "-T", "worker", "wget", "-q", "-O", "-", "http://web:8000/"]);
    assert!(found.contains("Hostname:"), "{found}");
    let found = compose(&["exec", "-T", "worker", "nslookup", "helper"]);
    assert!(found.matches("Address").count() >= 3, "{found}");
    compose(&["up", "-d", "--scale", "worker=1"]);
    assert_eq!(host.running().len(), 2);
    compose(&["restart", "-t", "0", "worker"]);
    compose(&["down", "-v", "-t", "0"]);
    assert!(host.running().is_empty());
    let left = host.ok(&["volume", "ls", "-q"]) + &host.ok(&["network", "ls", "--format", "{{.Name}}"]);
    assert!(!left.contains("project"), "{left}");
}
