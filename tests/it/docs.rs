//! `GET /openapi.json` and `GET /docs`: what the service says of itself.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::TestApp;

/// The committed document, so that a change of the API shows in a review.
const SNAPSHOT: &str = include_str!("openapi.json");

/// Every operation, and every status that it answers: of a success, then of an error.
const OPERATIONS: [(&str, &str, &[u16]); 7] = [
    ("post", "/register", &[201, 400, 409, 413, 415, 422, 429, 500, 503]),
    ("post", "/login", &[200, 400, 401, 413, 415, 422, 429, 500, 503]),
    ("get", "/me", &[200, 401, 500, 503]),
    ("get", "/users/{username}", &[200, 401, 404, 500, 503]),
    ("post", "/send", &[201, 400, 401, 404, 409, 413, 415, 422, 429, 500, 503]),
    ("get", "/messages", &[200, 400, 401, 404, 422, 500, 503]),
    ("get", "/healthz", &[200, 500, 503]),
];

fn document() -> Value {
    let text = chat_service::http::routes::PublicApi::new().document_json().expect("a document");
    serde_json::from_str(&text).expect("the document is JSON")
}

fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().expect("paths").iter();
    paths
        .flat_map(|(path, item)| {
            let item = item.as_object().expect("a path's operations").iter();
            item.map(move |(method, operation)| (method.as_str(), path.as_str(), operation))
        })
        .collect()
}

#[test]
fn the_document_is_the_committed_one() {
    let current = chat_service::http::routes::PublicApi::new().document_json().expect("a document") + "\n";
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
    let answer = app.get("/openapi.json").answer().await;
    assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json")));
    let served: Value = serde_json::from_str(&answer.text(200)).expect("JSON");
    assert_eq!(served, document());
}

#[test]
fn it_is_an_openapi_3_1_document_of_the_public_port_only() {
    let document = document();
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1.")));
    assert_eq!(document["info"]["title"], "chat-service");
    let mut found: Vec<(&str, &str)> =
        operations(&document).into_iter().map(|(method, path, _)| (method, path)).collect();
    found.sort_unstable();
    let mut expected: Vec<(&str, &str)> =
        OPERATIONS.iter().map(|(method, path, _)| (*method, *path)).collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
    let bearer = &document["components"]["securitySchemes"]["bearer"];
    assert_eq!((bearer["type"].as_str(), bearer["scheme"].as_str()), (Some("http"), Some("bearer")));
}

#[test]
fn every_operation_declares_every_status_that_it_answers() {
    let document = document();
    for (method, path, expected) in OPERATIONS {
        let operation = &document["paths"][path][method];
        let mut statuses: Vec<u16> = operation["responses"]
            .as_object()
            .unwrap_or_else(|| panic!("no {method} {path}"))
            .keys()
            .map(|status| status.parse().expect("a status"))
            .collect();
        statuses.sort_unstable();
        assert_eq!(statuses, expected, "{method} {path}");
        let names = ["operationId", "summary", "tags"];
        assert!(names.iter().all(|name| operation.get(*name).is_some()), "{method} {path}: one of {names:?}");
    }
    let ids: BTreeSet<_> =
        operations(&document).iter().map(|(_, _, operation)| operation["operationId"].to_string()).collect();
    assert_eq!(ids.len(), OPERATIONS.len(), "{ids:?}");
}

#[test]
fn every_error_is_a_problem_with_its_headers_and_an_example() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        for (status, response) in operation["responses"].as_object().expect("responses") {
            let place = format!("{method} {path} {status}");
            assert!(response["headers"]["x-request-id"].is_object(), "{place}: x-request-id");
            // Readiness tells what is wrong in the form that it always has.
            if !status.starts_with(['4', '5']) || (path, status.as_str()) == ("/healthz", "503") {
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
    let document = document();
    for (method, path, operation) in operations(&document) {
        let responses = operation["responses"].as_object().expect("responses").values();
        for body in responses.chain(operation.get("requestBody")) {
            for content in body["content"].as_object().expect("a body").values() {
                let has = content.get("example").is_some() || has_example(&document, &content["schema"]);
                assert!(has, "{method} {path}: {content}");
            }
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(parameter["description"].is_string(), "{method} {path}: {parameter}");
        }
    }
}

#[test]
fn the_limits_of_the_contract_are_in_the_document() {
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
    let moved = app.get("/docs").answer().await;
    assert_eq!((moved.status, moved.header("location")), (302, Some("/docs/")));
    let page = app.get("/docs/").answer().await;
    assert!(page.header("content-type").is_some_and(|kind| kind.starts_with("text/html")));
    // What the page may load is also the browser's to see to.
    let policy = page.header("content-security-policy").expect("a policy").to_owned();
    assert!(policy.contains("default-src 'self'") && !policy.contains("http"), "{policy}");
    let html = page.text(200);
    assert!(html.contains("\"/openapi.json\""), "{html}");
    assert!(!html.contains("://") && !html.contains("\"//"), "an outside host in\n{html}");
    let assets: Vec<&str> = ["src=\"", "href=\""]
        .iter()
        .flat_map(|attribute| html.split(attribute).skip(1))
        .filter_map(|rest| rest.split('"').next())
        .collect();
    assert!(assets.len() >= 3, "{html}");
    for asset in assets {
        let path = format!("/docs/{}", asset.trim_start_matches("./"));
        let answer = app.get(&path).answer().await;
        assert_eq!(answer.status, 200, "{path}");
        let kind = answer.header("content-type").unwrap_or_default();
        let expected = if path.ends_with(".css") { "css" } else { "javascript" };
        assert!(kind.contains(expected), "{path} is {kind}");
        assert!(answer.body.len() > 1000, "{path} has {} bytes", answer.body.len());
    }
}
