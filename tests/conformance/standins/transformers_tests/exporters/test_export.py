"""Stands in for upstream's module of this name: `torch.export` of every model class, with a dynamic length."""

import torch


class ExportTesterMixin:
    def test_torch_export(self):
        if not self.test_torch_exportable:
            self.skipTest("the model declares that it cannot be exported")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.use_cache = False
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(config).eval()
                # tracing settles whether there is one chunk or several; here, several
                length = torch.export.Dim("length", min=getattr(config, "chunk_size", 1) + 1, max=1024)
                shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                program = torch.export.export(
                    model,
                    (),
                    {"input_ids": ids, "attention_mask": mask},
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
                longer = {"input_ids": ids.repeat(1, 3), "attention_mask": mask.repeat(1, 3)}
                with torch.no_grad():
                    expected, exported = model(**longer), program.module()(**longer)
                torch.testing.assert_close(exported[0], expected[0], atol=1e-5, rtol=1e-5)
