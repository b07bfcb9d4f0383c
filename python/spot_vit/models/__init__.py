"""Sparse models: conversion of timm models, the block loop, LV-ViT, published weights."""
