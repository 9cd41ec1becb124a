//! `GET /openapi.json` and `GET /docs`: the service's documentation.

use std::collections::BTreeSet;

use chat_service::http::routes::public_api;
use serde_json::Value;

use crate::support::{TestApp, document, operations};

/// The committed document: a review shows every change of the API.
const SNAPSHOT: &str = include_str!("openapi.json");

#[test]
fn the_document_is_the_committed_one() {
    let current = public_api().document_json().expect("a document") + "\n";
    let first_change = current.lines().zip(SNAPSHOT.lines()).enumerate().find(|(_, (new, old))| new != old);
    assert!(
        current == SNAPSHOT,
        "the OpenAPI document is not tests/it/openapi.json any more, first at {first_change:?}.\n\
         If the change is wanted: cargo xtask openapi, and commit the file"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_serves_the_document_that_it_prints() {
    let app = TestApp::start().await;
    let answer = app.get("/openapi.json").response().await;
    assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json")));
    let served: Value = serde_json::from_str(&answer.text(200)).expect("JSON");
    assert_eq!(&served, document());
}

#[test]
fn it_is_an_openapi_3_1_document_of_the_public_port_only() {
    let document = document();
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1.")));
    assert_eq!(document["info"]["title"], "chat-service");
    // Nor the documentation itself, nor the page, is a part of it.
    let others =
        ["/openapi.json", "/docs/{**}", "/", "/page/page.css", "/page/page.js", "/page/chat-client.js"];
    let others = others.iter().chain(&["/page/icon.svg"]).map(|path| format!("GET {path}"));
    let expected: BTreeSet<_> = operations().iter().map(ToString::to_string).chain(others).collect();
    let served = public_api().endpoints().into_iter();
    assert_eq!(expected, served.map(|endpoint| format!("{} {}", endpoint.method, endpoint.route)).collect());
    // Relative to where the document is, so that a proxy may serve both under a prefix.
    assert_eq!(document["servers"], serde_json::json!([{"url": "."}]));
    let bearer = &document["components"]["securitySchemes"]["bearer"];
    assert_eq!((bearer["type"].as_str(), bearer["scheme"].as_str()), (Some("http"), Some("bearer")));
}

#[test]
fn every_operation_has_one_success_a_summary_tags_and_a_unique_id() {
    let operations = operations();
    for operation in &operations {
        let successes = operation.statuses().into_iter().filter(|status| *status < 400);
        assert_eq!(successes.count(), 1, "{operation}");
        for name in ["operationId", "summary", "tags"] {
            assert!(operation.documented.get(name).is_some(), "{operation}: {name}");
        }
    }
    let ids: BTreeSet<_> =
        operations.iter().map(|operation| operation.documented["operationId"].as_str()).collect();
    assert_eq!(ids.len(), operations.len(), "{ids:?}");
}

#[test]
fn every_error_is_a_problem_with_its_headers_and_an_example() {
    for operation in operations() {
        for (status, response) in operation.documented["responses"].as_object().expect("responses") {
            let place = format!("{operation} {status}");
            assert!(response["headers"]["x-request-id"].is_object(), "{place}: x-request-id");
            // Readiness has the same form with 503 as with 200.
            if !status.starts_with(['4', '5']) || (&*operation.path, &**status) == ("/healthz", "503") {
                continue;
            }
            let kinds: Vec<_> = response["content"].as_object().expect("a body").keys().collect();
            assert_eq!(kinds, ["application/problem+json"], "{place}");
            let content = &response["content"]["application/problem+json"];
            assert_eq!(content["schema"]["$ref"], "#/components/schemas/Problem", "{place}");
            let example = &content["example"];
            assert_eq!(example["status"].to_string(), *status, "{place}: {example}");
            assert_eq!(example.get("errors").is_some(), status == "422", "{place}: {example}");
            for (of, header) in [("401", "www-authenticate"), ("429", "retry-after"), ("503", "retry-after")]
            {
                let declared = response["headers"].get(header).is_some();
                assert!(declared || status != of, "{place}: {header}");
            }
        }
    }
}

#[test]
fn every_body_has_an_example() {
    fn has_example(document: &Value, schema: &Value) -> bool {
        if let Some(reference) = schema["$ref"].as_str() {
            let target = document.pointer(reference.trim_start_matches('#'));
            return target.is_some_and(|target| has_example(document, target));
        }
        let members = schema["properties"].as_object();
        schema.get("examples").is_some()
            || schema.get("items").is_some_and(|items| has_example(document, items))
            || members.is_some_and(|members| members.values().all(|member| has_example(document, member)))
    }
    for operation in operations() {
        let responses = operation.documented["responses"].as_object().expect("responses");
        let with_body = responses
            .iter()
            .filter(|(status, _)| !["202", "204"].contains(&&***status))
            .map(|(_, response)| response);
        for body in with_body.chain(operation.documented.get("requestBody")) {
            for content in body["content"].as_object().expect("a body").values() {
                let has = content.get("example").is_some() || has_example(document(), &content["schema"]);
                assert!(has, "{operation}: {content}");
            }
        }
        for parameter in operation.documented["parameters"].as_array().into_iter().flatten() {
            assert!(parameter["description"].is_string(), "{operation}: {parameter}");
        }
    }
}

#[test]
fn the_document_has_the_limits_of_the_contract() {
    let document = document();
    let parameter = |name: &str| {
        let parameters = document["paths"]["/messages"]["get"]["parameters"].as_array().expect("parameters");
        parameters.iter().find(|parameter| parameter["name"] == name).expect("the parameter").clone()
    };
    let limit = &parameter("limit")["schema"];
    let bounds = ["minimum", "maximum", "default"].map(|bound| limit[bound].as_f64());
    assert_eq!(bounds, [Some(1.0), Some(100.0), Some(5.0)], "{limit}");
    assert_eq!(parameter("peer_id")["required"], true);
    for name in ["limit", "offset", "before", "after"] {
        assert_ne!(parameter(name)["required"], true, "{name}");
    }
    // They exclude one another, and some generated clients send every default.
    for name in ["offset", "before", "after"] {
        assert_eq!(parameter(name)["schema"].get("default"), None, "{name}");
    }
    let schemas = &document["components"]["schemas"];
    for (schema, property, shortest, longest) in [
        ("Register", "username", 3, 32),
        ("Register", "password", 8, 128),
        ("SendMessage", "content", 1, 4000),
    ] {
        let property = &schemas[schema]["properties"][property];
        assert_eq!((&property["minLength"], &property["maxLength"]), (&shortest.into(), &longest.into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn swagger_ui_shows_the_document_without_any_outside_asset() {
    let app = TestApp::start().await;
    let moved = app.get("/docs").response().await;
    assert_eq!((moved.status, moved.header("location")), (302, Some("docs/")));
    let page = app.get("/docs/").response().await;
    assert!(page.header("content-type").is_some_and(|kind| kind.starts_with("text/html")));
    // The browser enforces what the page may load.
    let policy = page.header("content-security-policy").expect("a policy").to_owned();
    assert!(policy.contains("default-src 'self'") && !policy.contains("http"), "{policy}");
    let html = page.text(200);
    assert!(html.contains("\"../openapi.json\""), "{html}");
    assert!(!html.contains("://") && !html.contains("\"//"), "an outside host in\n{html}");
    let assets: Vec<&str> = ["src=\"", "href=\""]
        .iter()
        .flat_map(|attribute| html.split(attribute).skip(1))
        .filter_map(|rest| rest.split('"').next())
        .collect();
    assert!(assets.len() >= 3, "{html}");
    for asset in assets {
        let path = format!("/docs/{}", asset.trim_start_matches("./"));
        let answer = app.get(&path).response().await;
        assert_eq!(answer.status, 200, "{path}");
        let kind = answer.header("content-type").unwrap_or_default();
        let expected = if path.ends_with(".css") { "css" } else { "javascript" };
        assert!(kind.contains(expected), "{path} is {kind}");
        assert!(answer.body.len() > 1000, "{path} has {} bytes", answer.body.len());
    }
}
