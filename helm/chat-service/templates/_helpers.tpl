{{/* The naming of `helm create`. */}}
{{- define "chat-service.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "chat-service.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/*
The name of a component: (list $ "postgres"). At most 52 characters, since Kubernetes appends up to 11 characters in labels,
which are limited to 63. A hash replaces the truncated rest, so that two long names stay different.
*/}}
{{- define "chat-service.partName" -}}
{{- $full := include "chat-service.fullname" (first .) }}
{{- $part := last . }}
{{- $room := sub 51 (len $part) | int }}
{{- if gt (len $full) $room }}
{{- $full = printf "%s-%s" (trunc (sub $room 5 | int) $full | trimSuffix "-") (sha256sum $full | trunc 4) }}
{{- end }}
{{- printf "%s-%s" $full $part }}
{{- end }}

{{/*
The Deployment's replicas. With the autoscaler as many as run now, within its bounds. Helm removes a field that the last revision had and
this one has not, and then Kubernetes takes 1: the service would lose its capacity until the autoscaler looks again. Where the cluster
cannot be asked (`helm template`, Argo CD), no replicas, since any number would undo what the autoscaler does. 0 switches it off,
and stays.
*/}}
{{- define "chat-service.replicas" -}}
{{- if .Values.autoscaling.enabled }}
{{- with lookup "apps/v1" "Deployment" .Release.Namespace (include "chat-service.fullname" .) }}
{{- $now := int .spec.replicas }}
{{- if $now }}{{ min $.Values.autoscaling.maxReplicas (max $.Values.autoscaling.minReplicas $now) }}{{ else }}0{{ end }}
{{- end }}
{{- else }}
{{- .Values.replicaCount }}
{{- end }}
{{- end }}

{{- define "chat-service.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Labels that select the pods of a component: (list $ "server"). Never change them: selectors are immutable. */}}
{{- define "chat-service.selectorLabels" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ include "chat-service.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "chat-service.labels" -}}
{{- $root := first . -}}
helm.sh/chart: {{ include "chat-service.chart" $root }}
{{ include "chat-service.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Name, namespace and labels of an object: (list $ name component). */}}
{{- define "chat-service.metadata" -}}
{{- $root := first . -}}
name: {{ index . 1 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "chat-service.labels" (list $root (last .)) | nindent 2 }}
{{- end }}

{{/* The name of the monitor of a component: (list $ "canary"). The service's own is named after the release. */}}
{{- define "chat-service.monitorName" -}}
{{- if eq (last .) "canary" }}{{ include "chat-service.partName" . }}{{ else }}{{ include "chat-service.fullname" (first .) }}{{ end }}
{{- end }}

{{- define "chat-service.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "chat-service.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* (list $ image default-tag) */}}
{{- define "chat-service.image" -}}
{{- $image := index . 1 }}
{{- $name := $image.repository }}
{{- with (first .).Values.global.imageRegistry | default $image.registry }}
{{- $name = printf "%s/%s" (trimSuffix "/" .) $name }}
{{- end }}
{{- if $image.digest }}
{{- printf "%s@%s" $name $image.digest }}
{{- else }}
{{- printf "%s:%s" $name (default (last .) $image.tag) }}
{{- end }}
{{- end }}

{{- define "chat-service.serverImage" -}}
{{- include "chat-service.image" (list . .Values.image .Chart.AppVersion) }}
{{- end }}

{{/* Scheduling and pull secrets of a pod: (list $ values). */}}
{{- define "chat-service.scheduling" -}}
{{- $root := first . -}}
{{- $values := last . -}}
{{- with concat ($root.Values.global.imagePullSecrets | default list) ($root.Values.imagePullSecrets | default list) | uniq }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Labels of a pod: (list $ component podLabels). Without the chart's version, so that a new one does not restart pods. */}}
{{- define "chat-service.podLabels" -}}
{{- $root := first . -}}
{{- $given := merge (dict) (last .) $root.Values.commonLabels -}}
{{- include "chat-service.selectorLabels" (list $root (index . 1)) }}
{{- with $given }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* "true" if there is more than one replica. */}}
{{- define "chat-service.isReplicated" -}}
{{- if .Values.autoscaling.enabled }}
{{- if gt (int .Values.autoscaling.minReplicas) 1 }}true{{ end }}
{{- else if gt (int .Values.replicaCount) 1 }}true{{ end }}
{{- end }}

{{- define "chat-service.graceSeconds" -}}
{{- $streams := .Values.config.STREAM_DRAIN_SECONDS }}
{{- max (int (.Values.config.SHUTDOWN_GRACE_SECONDS | default 20)) (int (ternary 30 $streams (kindIs "invalid" $streams))) }}
{{- end }}

{{/* The time that a terminating pod needs: preStop sleep, graceful shutdown, and 10 s until the process has exited. */}}
{{- define "chat-service.terminationSeconds" -}}
{{- add (int .Values.preStopSeconds) (int (include "chat-service.graceSeconds" .)) 10 }}
{{- end }}

{{/* Formats integers as integers: Helm reads 16777216 from YAML as the float 1.6777216e+07. */}}
{{- define "chat-service.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{/* Separate from the ConfigMap, so that the checksum covers only the data: a new chart version alone restarts no pods. */}}
{{- define "chat-service.config" -}}
# The Job migrates; the service waits for it, live and unready.
MIGRATE_ON_START: "false"
PORT: "8000"
OPS_PORT: "9000"
{{- range $name, $value := .Values.config }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
{{ $name }}: {{ include "chat-service.scalar" $value | quote }}
{{- end }}
{{- end }}
{{- end }}
